"""Split (inductive) conformal calibration of uncertainties.

Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (Springer, 2005); for regression with errors divided
by an estimate of their size: Papadopoulos et al., Lect. Notes Comput. Sci. 2430, 345 (2002); Lei et al., J. Am. Stat.
Assoc. 113, 1094 (2018). For interatomic potentials: Zaverkin et al., npj Comput. Mater. 10, 83 (2024). With weights,
for data that change with time: Barber, Candès, Ramdas and Tibshirani, Ann. Stat. 51, 816 (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ubmd.errors import DataError

EPSILON = 1e-8  # in the units of error and uncertainty; avoids the ratio 0/0


@dataclass(frozen=True)
class ConformalScale:
    """The factor q with P(|error| <= q u) >= 1 - alpha on exchangeable data.

    attainable: the confidence level that this calibration set reaches: 1 - alpha, or n/(n + 1) if that is less, with n
        the number of ratios or the sum of their weights.
    """

    scale: float
    alpha: float
    attainable: float
    count: int


def conformal_scale(
    errors: ArrayLike, uncertainties: ArrayLike, alpha: float, weights: ArrayLike | None = None
) -> ConformalScale:
    """The smallest ratio r = (|error| + eps)/(u + eps) below or at which the weight is (1 - alpha)(1 + sum of weights).

    The new point has weight 1 and stands at infinity. Weights must not depend on the data; the loss of coverage is then
    at most the sum over points of w/(1 + sum of w) times the total variation distance between the data as they are and
    with this point and the new one exchanged (Barber et al., theorem 2). Without weights all are 1, and the factor is
    the k-th smallest ratio, k = ceil((n + 1)(1 - alpha)).

    If the level is not attainable the largest ratio is used, and attainable is n/(n + 1), with n the sum of weights.

    Raises:
        DataError: no calibration point, unequal lengths, or values that are not finite, or no positive weights.
    """
    error = np.abs(np.asarray(errors, dtype=float)).ravel()
    u = np.asarray(uncertainties, dtype=float).ravel()
    weight = np.ones(len(u)) if weights is None else np.asarray(weights, dtype=float).ravel()
    if not len(error) == len(u) == len(weight) or len(u) == 0:
        raise DataError(
            f"Conformal calibration needs one error per uncertainty and at least one, got {len(error)} and {len(u)}."
        )
    if not (np.isfinite(error).all() and np.isfinite(u).all()):
        raise DataError("Conformal calibration got errors or uncertainties that are not finite numbers.")
    if not (np.isfinite(weight).all() and (weight > 0.0).all()):
        raise DataError("Conformal calibration got weights that are not positive numbers.")
    ratios = (error + EPSILON) / (u + EPSILON)
    order = np.argsort(ratios, kind="stable")
    total = float(weight.sum())
    below = np.cumsum(weight[order])
    # The sums of equal weights round differently than their number: a relative 1e-9 is taken for equal.
    k = int(np.searchsorted(below * (1.0 + 1e-9), (1.0 - alpha) * (total + 1.0)))
    if k >= len(u):
        return ConformalScale(float(ratios[order[-1]]), alpha, total / (total + 1.0), len(u))
    return ConformalScale(float(ratios[order[k]]), alpha, 1.0 - alpha, len(u))
