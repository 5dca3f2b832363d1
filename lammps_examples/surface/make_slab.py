"""A silver atom in a hollow site of Cu(100): 3 x 3 cells, four layers, of which the two lowest are fixed.

Usage: python make_slab.py     (writes slab.extxyz)
"""

from pathlib import Path

from ase.build import add_adsorbate, fcc100
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import BFGS

from ubmd.data.extxyz import write_structures

slab = fcc100("Cu", (3, 3, 4), a=3.59, vacuum=8.0)  # EMT's lattice constant, Å
slab.set_constraint(FixAtoms(mask=slab.get_tags() > 2))
add_adsorbate(slab, "Ag", 1.8, "hollow")
slab.pbc = (True, True, False)
slab.calc = EMT()
BFGS(slab, logfile=None).run(fmax=0.01)
slab.calc = None
slab.info.clear()  # of ASE's builder
write_structures(Path(__file__).parent / "slab.extxyz", [slab])
