"""Figures that judge a run: arrays in, numbers out. panel.py makes its tables of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from ubmd.measure.errors import spearman

Array = NDArray[np.float64]


def largest(values: ArrayLike, counts: Sequence[int]) -> Array:
    """Largest value of each structure [S], from values of atoms [A] and the number of atoms of each structure [S]."""
    ends = np.cumsum(counts)
    return np.array([part.max() for part in np.split(np.asarray(values, dtype=np.float64), ends[:-1])])


def ceilings(u: ArrayLike, counts: Sequence[int], repeats: int = 20, seed: int = 0) -> tuple[float, float]:
    """Spearman correlations that an uncertainty of this spread has at most: those of a perfect Gaussian, on average.

    Errors are drawn as the root mean square of three normal components of standard deviation u_i: then u_i is the true
    width of every error. A factor on all u_i changes nothing.

    Args:
        u: of atoms [A].
        counts: atoms of each structure [S].
        repeats: sets of errors that are drawn.
        seed: of the random numbers.

    Returns:
        Of atoms, and of the maxima of structures.
    """
    width = np.asarray(u, dtype=np.float64)
    rng = np.random.default_rng(seed)
    most = largest(width, counts)
    found = []
    for _ in range(repeats):
        error = width * np.sqrt(np.mean(rng.standard_normal((len(width), 3)) ** 2, axis=1))
        found.append((spearman(width, error), spearman(most, largest(error, counts))))
    atoms, maxima = np.mean(found, axis=0)
    return float(atoms), float(maxima)


def worst_found(error: ArrayLike, u: ArrayLike, worst: float = 0.01, top: float = 0.1) -> float:
    """Share of the atoms with the largest errors that are among those with the largest u; 0.1 for a u without use.

    Args:
        error: of atoms [A].
        u: of the same atoms [A].
        worst: share of the atoms that count as those with the largest errors; at least one atom.
        top: share of the atoms that a user would look at; at least one atom.
    """
    errors, widths = np.asarray(error), np.asarray(u)
    bad, looked_at = (max(1, round(share * len(errors))) for share in (worst, top))
    order = np.argsort(-widths, kind="stable")[:looked_at]
    return float(np.isin(np.argsort(-errors, kind="stable")[:bad], order).mean())


def labels_to_reach(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """Labels of the first model whose error is at most the target; None if no model's is.

    Args:
        curve: labels and error of each model, in order.
        target: error.
    """
    return next((labels for labels, error in curve if error <= target), None)


def restricted_mean(labels: Sequence[int | None], limit: int) -> float:
    """Mean number of labels, where a run that missed the target counts as ``limit``: a lower bound of the mean."""
    return float(np.mean([limit if number is None else number for number in labels]))


def wilson(hits: int, number: int) -> tuple[float, float]:
    """95 % interval of a share, ``hits`` of ``number`` (E. B. Wilson, J. Am. Stat. Assoc. 22, 209 (1927))."""
    if number == 0:
        return 0.0, 1.0
    interval = binomtest(hits, number).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_interval(
    differences: Mapping[str, Sequence[float]], resamples: int = 10000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % percentile interval from the bootstrap.

    Seeds are resampled within each system; systems count the same, and are not resampled.

    Args:
        differences: system -> one difference per seed; no system may be empty.
        resamples: of the bootstrap.
        seed: of the random numbers.

    Returns:
        Mean, lower and upper end; both ends are NaN where a system has fewer than two seeds.
    """
    rng = np.random.default_rng(seed)
    groups = [np.asarray(group, dtype=np.float64) for group in differences.values()]
    mean = float(np.mean([group.mean() for group in groups]))
    if min(map(len, groups)) < 2:
        return mean, math.nan, math.nan
    means = [group[rng.integers(len(group), size=(resamples, len(group)))].mean(axis=1) for group in groups]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return mean, float(low), float(high)


def jumps(factors: Sequence[Mapping[str, float]]) -> list[float]:
    """|ln(f_(t+1) / f_t)| of the calibration factors of successive models, mean over elements if each has its own."""
    return [
        float(np.mean([abs(math.log(after[name] / before[name])) for name in after]))
        for before, after in itertools.pairwise(factors)
    ]
