"""MD in ASE with a model, stopped where the model gets unsure, and a relaxation of cell and atoms.

python train.py makes the model file.
"""

from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import BFGS
from ase.units import GPa, fs

import ubmd

LIMIT = 0.5  # eV/Å

atoms = bulk("Cu", cubic=True) * 2
atoms.calc = ubmd.Calculator("alloy_model/model.pt")
BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=100)
print(f"a = {atoms.cell.lengths()[0] / 2:.3f} Å, pressure {-atoms.get_stress()[:3].mean() / GPa:.3f} GPa")

MaxwellBoltzmannDistribution(atoms, temperature_K=600)
dynamics = Langevin(atoms, 2 * fs, temperature_K=600, friction=0.01 / fs, fixcm=False)
for _ in dynamics.irun(200):
    u = atoms.calc.results["atomic_uncertainties"].max()
    if u > LIMIT:
        print(f"step {dynamics.nsteps}: {u:.2f} eV/Å, beyond {LIMIT} eV/Å: label this structure")
        break
print(f"{dynamics.nsteps} steps, last u {u:.3f} eV/Å")
