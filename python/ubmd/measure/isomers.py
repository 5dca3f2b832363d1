"""Amide bonds of molecules: which structures have a cis one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.neighborlist import natural_cutoffs, neighbor_list
from numpy.typing import NDArray

from ubmd.measure.torsions import Torsion, torsions


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


def are_cis(structures: Sequence[Atoms], amides: Sequence[Torsion]) -> NDArray[np.bool_]:
    """[N]: whether at least one of these amide bonds is cis (|ω| < 90°)."""
    if not amides or not structures:
        return np.zeros(len(structures), dtype=np.bool_)
    cis: NDArray[np.bool_] = np.any(np.abs(torsions(structures, amides)) < np.pi / 2, axis=1)
    return cis


def count_cis(structures: Sequence[Atoms], amides: Sequence[Torsion]) -> int:
    """Number of structures in which at least one of these amide bonds is cis (|ω| < 90°)."""
    return int(are_cis(structures, amides).sum())


def isomers(structures: Sequence[Atoms]) -> dict[str, list[int]]:
    """'trans' and 'cis' -> indices of the structures without and with a cis amide bond.

    MD at room temperature hardly ever isomerises an amide bond, so errors of a test set that contains both mix
    structures like those of a training set with others unlike them. Empty unless these are structures of one molecule
    (atoms in one order) of which both isomers occur.
    """
    if not structures or any(a.pbc.any() or list(a.numbers) != list(structures[0].numbers) for a in structures):
        return {}
    cis = are_cis(structures, amide_torsions(structures[0]))
    found = {"trans": np.flatnonzero(~cis).tolist(), "cis": np.flatnonzero(cis).tolist()}
    return found if all(found.values()) else {}
