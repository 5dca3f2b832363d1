"""Rock salt MgO, 64 atoms: python make_mgo.py     (writes mgo.extxyz)"""

from pathlib import Path

from ase.build import bulk

from ubmd.data.extxyz import write_structures

crystal = bulk("MgO", "rocksalt", a=4.25, cubic=True).repeat(2)  # Å, as with PBE
write_structures(Path(__file__).parent / "mgo.extxyz", [crystal])
