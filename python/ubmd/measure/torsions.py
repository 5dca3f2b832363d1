"""Torsion angles of many structures at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
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
