"""Make the molecule of this example from scratch: python make_inputs.py

Writes, next to this script:
  alanine_dipeptide.pdb   ACE-ALA-NME with residue and atom names (OpenMM takes the topology from it)
  c7eq.extxyz             the same atoms at the C7eq minimum of AMBER ff19SB, labelled (start structure)
  alanine.data            the same structure as a LAMMPS data file

The geometry is built atom by atom from textbook bond lengths and angles, turned to (phi, psi) near C7eq and
minimised, so the files depend on nothing but this script and the force field.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers
from ase.optimize import BFGS

from ubmd.data.extxyz import write_structures
from ubmd.references import label, make_calculator
from ubmd.settings import ReferenceSettings

HERE = Path(__file__).resolve().parent
REFERENCE = ReferenceSettings(calculator="openmm", arguments={"pdb": "alanine_dipeptide.pdb"})

# One atom per row: residue, name, element; then the atoms (by row) that place it, with the bond length (Å) to
# the first, the angle (degrees) with the second and the torsion (degrees) with the third.
ROWS = [
    ("ACE", "H1", "H", (1, 4, 5), 1.09, 109.5, 0.0),
    ("ACE", "CH3", "C", (), 0.0, 0.0, 0.0),
    ("ACE", "H2", "H", (1, 4, 5), 1.09, 109.5, 120.0),
    ("ACE", "H3", "H", (1, 4, 5), 1.09, 109.5, -120.0),
    ("ACE", "C", "C", (1,), 1.52, 109.5, 0.0),
    ("ACE", "O", "O", (4, 1), 1.23, 120.5, 0.0),
    ("ALA", "N", "N", (4, 1, 5), 1.335, 116.5, 180.0),
    ("ALA", "H", "H", (6, 4, 5), 1.01, 119.5, 180.0),  # trans amide: H opposite to O
    ("ALA", "CA", "C", (6, 4, 5), 1.45, 121.9, 0.0),
    ("ALA", "HA", "H", (8, 6, 14), 1.09, 109.0, 120.0),
    ("ALA", "CB", "C", (8, 6, 14), 1.53, 110.0, -120.0),  # L-alanine: C, CB, N clockwise seen from HA
    ("ALA", "HB1", "H", (10, 8, 6), 1.09, 109.5, 60.0),
    ("ALA", "HB2", "H", (10, 8, 6), 1.09, 109.5, 180.0),
    ("ALA", "HB3", "H", (10, 8, 6), 1.09, 109.5, -60.0),
    ("ALA", "C", "C", (8, 6, 4), 1.53, 110.0, 180.0),
    ("ALA", "O", "O", (14, 8, 6), 1.23, 120.5, 0.0),
    ("NME", "N", "N", (14, 8, 15), 1.335, 116.5, 180.0),
    ("NME", "H", "H", (16, 14, 15), 1.01, 119.5, 180.0),
    ("NME", "C", "C", (16, 14, 15), 1.45, 121.9, 0.0),
    ("NME", "H1", "H", (18, 16, 14), 1.09, 109.5, 60.0),
    ("NME", "H2", "H", (18, 16, 14), 1.09, 109.5, 180.0),
    ("NME", "H3", "H", (18, 16, 14), 1.09, 109.5, -60.0),
]
PHI = (4, 6, 8, 14)  # C-N-CA-C
PSI = (6, 8, 14, 16)  # N-CA-C-N
# Placement order: an atom comes after the atoms that place it.
ORDER = [1, 4, 5, 0, 2, 3, 6, 7, 8, 14, 10, 9, 11, 12, 13, 15, 16, 17, 18, 19, 20, 21]
C7EQ = (-80.0, 75.0)


def place(a: np.ndarray, b: np.ndarray, c: np.ndarray, length: float, angle: float, torsion: float) -> np.ndarray:
    """Position at a distance from a, an angle with a-b and a torsion with a-b-c (lengths in Å, angles in degrees)."""
    theta, omega = np.radians([angle, torsion])
    along = (a - b) / np.linalg.norm(a - b)
    normal = np.cross(b - c, along)
    normal /= np.linalg.norm(normal)
    side = np.cross(normal, along)
    direction = -np.cos(theta) * along + np.sin(theta) * (np.cos(omega) * side + np.sin(omega) * normal)
    return a + length * direction


def build() -> Atoms:
    """The extended molecule, trans amides, L-alanine."""
    positions = np.zeros((len(ROWS), 3))
    for index in ORDER:
        _, _, _, partners, length, angle, torsion = ROWS[index]
        # The first three atoms have too few partners: two fixed points stand in for the missing ones.
        points = [positions[i] for i in partners] + [np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, -1.0])]
        if partners:
            positions[index] = place(points[0], points[1], points[2], length, angle, torsion)
    return Atoms([row[2] for row in ROWS], positions)


def fold(atoms: Atoms, phi: float, psi: float) -> None:
    """Turn everything behind a torsion's middle bond so that phi and psi have these values (degrees)."""
    atoms.set_dihedral(*PHI, phi, indices=range(9, 22))
    atoms.set_dihedral(*PSI, psi, indices=range(15, 22))


def write_pdb(path: Path, atoms: Atoms) -> None:
    """PDB with the names the force field looks for."""
    numbers = {"ACE": 1, "ALA": 2, "NME": 3}
    lines = []
    for serial, (row, (x, y, z)) in enumerate(zip(ROWS, atoms.positions, strict=True), 1):
        residue, name, element = row[:3]
        lines.append(
            f"ATOM  {serial:5d}  {name:<3s} {residue} A{numbers[residue]:4d}    "
            f"{x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00          {element:>2s}"
        )
    path.write_text("\n".join([*lines, f"TER   {len(ROWS) + 1:5d}      NME A   3", "END", ""]))


def write_lammps(path: Path, atoms: Atoms, elements: tuple[str, ...]) -> None:
    """Data file for `atom_style atomic`; type k is the k-th element, as in the pair_coeff line of the scripts."""
    low, high = atoms.positions.min(axis=0) - 5.0, atoms.positions.max(axis=0) + 5.0
    lines = ["alanine dipeptide at C7eq (types: " + " ".join(elements) + ")", "", f"{len(atoms)} atoms"]
    lines += [f"{len(elements)} atom types", ""]
    lines += [f"{lo:.6f} {hi:.6f} {axis}lo {axis}hi" for lo, hi, axis in zip(low, high, "xyz", strict=True)]
    lines += ["", "Masses", ""]
    lines += [f"{k} {atomic_masses[atomic_numbers[name]]:.4f}  # {name}" for k, name in enumerate(elements, 1)]
    lines += ["", "Atoms  # atomic", ""]
    for tag, atom in enumerate(atoms, 1):
        x, y, z = atom.position
        lines.append(f"{tag} {elements.index(atom.symbol) + 1} {x:.10f} {y:.10f} {z:.10f}")
    path.write_text("\n".join([*lines, ""]))


def main() -> None:
    """Build, fold, minimise, write."""
    atoms = build()
    fold(atoms, *C7EQ)
    write_pdb(HERE / "alanine_dipeptide.pdb", atoms)
    atoms.calc = make_calculator(REFERENCE, HERE)
    BFGS(atoms, logfile=None).run(fmax=1e-4, steps=2000)
    atoms.positions -= atoms.get_center_of_mass()
    write_pdb(HERE / "alanine_dipeptide.pdb", atoms)
    write_structures(HERE / "c7eq.extxyz", [label(atoms, REFERENCE, HERE)])
    write_lammps(HERE / "alanine.data", atoms, ("H", "C", "N", "O"))
    angles = [(atoms.get_dihedral(*torsion) + 180.0) % 360.0 - 180.0 for torsion in (PHI, PSI)]
    print(f"C7eq: phi = {angles[0]:.1f}, psi = {angles[1]:.1f} degrees, E = {atoms.get_potential_energy():.6f} eV")


if __name__ == "__main__":
    main()
