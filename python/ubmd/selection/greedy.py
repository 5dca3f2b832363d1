"""Greedy selection of a batch of structures, given the training set.

One loop serves every method: score the candidates, take the best, remove its near-duplicates, let the
method update its scores, repeat. Features are structure features on the scale where the mean of |φ|² over the
training set is 1, so that λ² and the duplicate tolerance have no unit.

MaxDet and MaxDist with respect to training set and batch, and MaxDiag, as in Holzmüller et al., J. Mach. Learn. Res.
24, 164 (2023); for interatomic potentials: Zaverkin et al., Digital Discovery 1, 605 (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ubmd.errors import SettingsError
from ubmd.settings import SelectionSettings

Array = NDArray[np.float64]

METHODS: tuple[str, ...] = get_args(SelectionSettings.model_fields["method"].annotation)
"""Names of the selection methods, as in the settings file."""

# Share of the largest initial variance below which a structure counts as explained by the picks; it keeps the
# division of max_det away from rounding noise once the batch is as large as the rank of the features.
_NOISE_FLOOR = 1e-10


class _Rule(Protocol):
    """A selection method: the scores of all candidates, and what a pick changes."""

    scores: Array

    def picked(self, index: int) -> None: ...


def select(
    method: str,
    pool_features: ArrayLike,
    training_features: ArrayLike,
    pool_u: ArrayLike,
    count: int,
    lambda2: float,
    noise: float,
    duplicate_tolerance: float,
    rng: np.random.Generator,
) -> list[int]:
    """Indices of at most ``count`` structures of the pool, in the order of the picks.

    Args:
        method: ``max_det`` (largest determinant of the posterior kernel), ``max_dist`` (farthest from the training set
            and the picks), ``max_diag`` (largest u) or ``random``.
        pool_features: structure features [N, p].
        training_features: structure features of the training set [T, p]; T may be 0.
        pool_u: structure uncertainties [N]; only their order matters.
        count: size of the batch; fewer come back when the pool has fewer distinct structures.
        lambda2: ridge λ² of the posterior, in rescaled-feature units.
        noise: noise of ``max_det``: 0 maximises the determinant, λ² equals refitting with each pick.
        duplicate_tolerance: candidates closer than this (Euclidean, in feature space) to a training structure
            or to an earlier pick are never taken.
        rng: used by ``random`` only.

    Candidates with features or u that are not finite are never taken.

    Raises:
        SettingsError: unknown method.
    """
    pool, training, u = _as_arrays(pool_features, training_features, pool_u)
    candidates = np.isfinite(pool).all(axis=1) & np.isfinite(u)
    pool = np.where(candidates[:, None], pool, 0.0)
    candidates &= ~near_any(pool, training, duplicate_tolerance)
    rule = _make_rule(method, pool, training, u, lambda2, noise, rng)
    picks: list[int] = []
    while len(picks) < count and candidates.any():
        index = int(np.argmax(np.where(candidates, rule.scores, -np.inf)))
        picks.append(index)
        candidates[index] = False
        candidates &= ~near_any(pool, pool[index : index + 1], duplicate_tolerance)
        rule.picked(index)
    return picks


def near_any(features: Array, others: Array, tolerance: float) -> NDArray[np.bool_]:
    """Whether each row of ``features`` [N, p] is closer than ``tolerance`` to any row of ``others`` [T, p].

    Norms and products find the candidate pairs at the cost of one matrix product; because they lose half of the
    digits for nearly equal rows, the distance of each such pair is then computed from its difference.
    """
    near = np.zeros(len(features), dtype=bool)
    squares = np.sum(features**2, axis=1)[:, None] + np.sum(others**2, axis=1)
    suspects = squares - 2.0 * features @ others.T < tolerance**2 + 1e-10 * squares
    for row, column in zip(*np.nonzero(suspects), strict=True):
        near[row] |= bool(np.linalg.norm(features[row] - others[column]) < tolerance)
    return near


def _as_arrays(pool: ArrayLike, training: ArrayLike, u: ArrayLike) -> tuple[Array, Array, Array]:
    """Float64 arrays [N, p], [T, p], [N]; an empty training set may come in any shape."""
    pool_array = np.atleast_2d(np.asarray(pool, dtype=np.float64))
    training_array = np.asarray(training, dtype=np.float64).reshape(-1, pool_array.shape[1])
    u_array = np.asarray(u, dtype=np.float64).reshape(-1)
    if len(u_array) != len(pool_array):
        raise ValueError(f"pool_features has {len(pool_array)} rows but pool_u has {len(u_array)}")
    return pool_array, training_array, u_array


def _make_rule(
    method: str, pool: Array, training: Array, u: Array, lambda2: float, noise: float, rng: np.random.Generator
) -> _Rule:
    rules: dict[str, Callable[[], _Rule]] = {
        "max_det": lambda: _MaxDeterminant(pool, training, lambda2, noise),
        "max_dist": lambda: _MaxDistance(pool, training),
        "max_diag": lambda: _Fixed(u),
        "random": lambda: _Fixed(rng.permutation(len(pool)).astype(np.float64)),
    }
    if method not in rules:
        raise SettingsError(f"Unknown selection method {method!r}; choose one of {', '.join(METHODS)}.")
    return rules[method]()


class _Fixed:
    """Scores that no pick changes: uncertainties (max_diag) or a random order."""

    def __init__(self, scores: Array) -> None:
        self.scores = scores

    def picked(self, index: int) -> None:
        """Nothing to update."""


class _MaxDistance:
    """Squared distances to the nearest of training set and picks."""

    def __init__(self, pool: Array, training: Array) -> None:
        self._pool = pool
        self.scores = np.full(len(pool), np.inf)
        for known in training:
            self._approach(known)

    def picked(self, index: int) -> None:
        """Add the structure ``index`` to the known ones."""
        self._approach(self._pool[index])

    def _approach(self, known: Array) -> None:
        self.scores = np.minimum(self.scores, np.sum((self._pool - known) ** 2, axis=1))


class _MaxDeterminant:
    """Posterior variances that shrink with every pick (pivoted Cholesky factorisation of the kernel).

    k(s, t) = λ² φ_s·(ΦᵀΦ + λ²I)⁻¹ φ_t is written as v_s·v_t with v = λ L⁻¹ φ, where LLᵀ = ΦᵀΦ + λ²I. A pick x
    subtracts k(·, x) k(x, ·) / (k(x, x) + noise) from the kernel: one more column of the factor, O(N·(p + b)).
    """

    def __init__(self, pool: Array, training: Array, lambda2: float, noise: float) -> None:
        gram = training.T @ training + lambda2 * np.eye(pool.shape[1])
        self._v = np.sqrt(lambda2) * np.linalg.solve(np.linalg.cholesky(gram), pool.T).T
        self.scores = np.einsum("sp,sp->s", self._v, self._v)
        self._noise = max(noise, _NOISE_FLOOR * self.scores.max(initial=0.0), np.finfo(float).tiny)
        self._columns = np.zeros((len(pool), 0))

    def picked(self, index: int) -> None:
        """Condition the kernel on the structure ``index``."""
        row = self._v @ self._v[index] - self._columns @ self._columns[index]
        column = row / np.sqrt(self.scores[index] + self._noise)
        self._columns = np.column_stack([self._columns, column])
        self.scores = np.maximum(self.scores - column**2, 0.0)
