"""Structures of a data set that are there twice, or nearly so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

ALIKE = 0.02
"""Å, root mean square over the atoms (and cell vectors): structures that are closer teach nothing new"""
_BLOCK = 1000  # rows whose distances to all others are computed at once


def close_pairs(structures: Sequence[Atoms], tolerance: float = ALIKE) -> list[tuple[int, int, float]]:
    """Pairs (i < j) of structures with the same atoms in the same order that differ by less than ``tolerance``.

    Positions are compared as they are: periodic images and rotated copies count as different.

    Args:
        structures: any.
        tolerance: Å, root mean square of the differences of all positions and, of periodic structures, cell vectors.

    Returns:
        (i, j, that root mean square in Å), sorted.
    """
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    for k, atoms in enumerate(structures):
        groups.setdefault((atoms.numbers.tobytes(), atoms.pbc.tobytes()), []).append(k)
    pairs = []
    for members in groups.values():
        points = np.stack([_point(structures[k]) for k in members])
        pairs += [(members[i], members[j], d) for i, j, d in _close(points, tolerance)]
    return sorted(pairs)


def _point(atoms: Atoms) -> np.ndarray:
    """All coordinates as one vector, whose distances are root mean squares over its rows of three, Å."""
    cell = atoms.cell[:][atoms.pbc]
    rows = np.concatenate([atoms.positions, cell])
    flat: np.ndarray = rows.ravel() / np.sqrt(len(rows))
    return flat


def _close(points: np.ndarray, tolerance: float) -> list[tuple[int, int, float]]:
    """(i, j, distance) of the rows that are closer than this."""
    pairs = []
    centred = points - points.mean(axis=0)  # |a|^2 + |b|^2 - 2 ab loses fewer digits
    squares = np.einsum("ij,ij->i", centred, centred)
    for first in range(0, len(centred), _BLOCK):
        rows = centred[first : first + _BLOCK]
        near = squares[first : first + _BLOCK, None] + squares - 2.0 * rows @ centred.T < (2.0 * tolerance) ** 2
        found = np.argwhere(near) + np.array([first, 0])
        pairs += [(int(i), int(j), float(np.linalg.norm(points[i] - points[j]))) for i, j in found if i < j]
    return [pair for pair in pairs if pair[2] < tolerance]
