"""Coverage of a space of angles by a tree of ever finer cells."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def coverage(angles: ArrayLike, levels: int = 5) -> float:
    """Share of the space of d periodic angles that N points have visited, in [0, 1].

    Every level h = 1..``levels`` splits each dimension into 2^h equal parts of [-π, π]; a cell that is visited
    for the first time earns 2^(-dh), so a fully visited level earns 1; the sum is divided by ``levels``. For two
    angles and five levels the finest cells are 1024 squares of 11.25° (Zaverkin et al., npj Comput. Mater.
    10, 83 (2024), coverage of the (φ, ψ) space; the root does not count).

    Args:
        angles: [N, d], rad, any period.
        levels: depth of the tree.
    """
    growth = coverage_growth(angles, levels)
    return float(growth[-1]) if len(growth) else 0.0


def coverage_growth(angles: ArrayLike, levels: int = 5) -> NDArray[np.float64]:
    """Coverage [N] by the first 1, 2, ..., N points, in the order given; O(levels · N log N)."""
    points = np.asarray(angles, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"angles must have the shape [N, d], got {points.shape}")
    earned = np.zeros(len(points))
    if not len(points):
        return earned
    dimensions = points.shape[1]
    share = np.mod(points + np.pi, 2.0 * np.pi) / (2.0 * np.pi)
    # A tiny negative angle can be rounded up to a share of exactly 1: it belongs to the last cell.
    finest = np.minimum((share * 2**levels).astype(np.int64), 2**levels - 1)
    for level in range(1, levels + 1):
        cells = finest >> (levels - level)
        _, first_visits = np.unique(cells, axis=0, return_index=True)
        earned[first_visits] += 2.0 ** (-dimensions * level) / levels
    return np.cumsum(earned)
