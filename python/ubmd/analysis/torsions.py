"""Torsion angles of many structures at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from numpy.typing import NDArray

Torsion = tuple[int, int, int, int]


def torsions(structures: Sequence[Atoms], indices: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Torsion angles [N, k] in (-π, π], rad, for N structures with the same atoms and k atom quadruples.

    Sign and zero are ASE's (`Atoms.get_dihedral`): cis = 0, trans = π. Positions are taken as they are, without
    minimum images.
    """
    quadruples = np.asarray(indices, dtype=int).reshape(-1, 4)
    if not len(structures):
        return np.zeros((0, len(quadruples)))
    positions = np.stack([atoms.positions for atoms in structures])
    a, b, c, d = (positions[:, quadruples[:, corner]] for corner in range(4))
    axis = c - b
    normal_1, normal_2 = np.cross(b - a, axis), np.cross(axis, d - c)
    cosine = np.sum(normal_1 * normal_2, axis=-1)
    sine = np.sum(np.cross(normal_1, normal_2) * axis, axis=-1) / np.linalg.norm(axis, axis=-1)
    angles = np.arctan2(sine, cosine)
    return np.where(angles == -np.pi, np.pi, angles)


def amide_torsions(atoms: Atoms) -> list[Torsion]:
    """Quadruples (C, C', N, C) of the amide bonds C'(=O)-N of a molecule, found through covalent radii."""
    bonds: list[set[int]] = [set() for _ in atoms]
    for i, j in zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.2)), strict=True):
        bonds[i].add(int(j))

    def neighbours(index: int, element: str) -> list[int]:
        return [j for j in sorted(bonds[index]) if atoms.symbols[j] == element]

    found: list[Torsion] = []
    for carbon in (i for i, symbol in enumerate(atoms.symbols) if symbol == "C" and neighbours(i, "O")):
        for nitrogen in neighbours(carbon, "N"):
            before, after = neighbours(carbon, "C"), [j for j in neighbours(nitrogen, "C") if j != carbon]
            if before and after:
                found.append((before[0], carbon, nitrogen, after[0]))
    return found


def count_cis(structures: Sequence[Atoms], amides: Sequence[Torsion]) -> int:
    """Number of structures in which at least one of these amide bonds is cis (|ω| < 90°)."""
    if not amides or not structures:
        return 0
    return int(np.sum(np.any(np.abs(torsions(structures, amides)) < np.pi / 2, axis=1)))
