"""The repulsion of `ubmd.potentials.baseline`, written down once more: slow, pair by pair, with numpy."""

from __future__ import annotations

from itertools import product

import numpy as np
from ase import Atoms

# numbers and covalent radii (Å; Cordero et al., Dalton Trans. 2008, 2832) as printed
ELEMENTS = {"H": (1, 0.31), "C": (6, 0.76), "N": (7, 0.71), "O": (8, 0.66), "Cu": (29, 1.32), "Au": (79, 1.36)}


def pair_energy(a: str, b: str, r: float, envelope: bool = True) -> float:
    """V(r), eV, r in Å; perhaps without its end."""
    (z1, r1), (z2, r2) = ELEMENTS[a], ELEMENTS[b]
    if r >= r1 + r2:
        return 0.0
    s = r * (z1**0.23 + z2**0.23) / 0.46850
    screening = (
        0.18175 * np.exp(-3.19980 * s)
        + 0.50986 * np.exp(-0.94229 * s)
        + 0.28022 * np.exp(-0.40290 * s)
        + 0.02817 * np.exp(-0.20162 * s)
    )
    x = r / (r1 + r2)
    end = 1.0 - 28.0 * x**6 + 48.0 * x**7 - 21.0 * x**8 if envelope else 1.0
    return 14.399645 * z1 * z2 / r * screening * end


def atomic_energies(atoms: Atoms) -> np.ndarray:
    """Halves of all pairs [n], eV; of cells that are wider than a bond is long."""
    images = [np.array(shift) @ atoms.cell.array for shift in product(*(range(-1, 2) if p else [0] for p in atoms.pbc))]
    energies = np.zeros(len(atoms))
    for i, j in product(range(len(atoms)), repeat=2):
        for image in images:
            r = float(np.linalg.norm(atoms.positions[j] + image - atoms.positions[i]))
            if r > 0.0:
                energies[i] += 0.5 * pair_energy(atoms.symbols[i], atoms.symbols[j], r)
    return energies


def energy(atoms: Atoms) -> float:
    """Of the structure, eV."""
    return float(atomic_energies(atoms).sum())
