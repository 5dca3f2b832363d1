"""Split (inductive) conformal calibration of uncertainties.

Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (Springer, 2005); for regression with errors divided
by an estimate of their size: Papadopoulos et al., Lect. Notes Comput. Sci. 2430, 345 (2002); Lei et al., J. Am. Stat.
Assoc. 113, 1094 (2018). For interatomic potentials: Zaverkin et al., npj Comput. Mater. 10, 83 (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ubmd.errors import DataError

EPSILON = 1e-8  # in the units of error and uncertainty; avoids the ratio 0/0


@dataclass(frozen=True)
class ConformalScale:
    """The factor q with P(|error| <= q u) >= 1 - alpha on exchangeable data.

    attainable: the confidence level that this calibration set reaches (1 - alpha, or n/(n + 1) if that is less).
    """

    scale: float
    alpha: float
    attainable: float
    count: int


def conformal_scale(errors: ArrayLike, uncertainties: ArrayLike, alpha: float) -> ConformalScale:
    """The k-th smallest ratio (|error| + eps)/(u + eps), k = ceil((n + 1)(1 - alpha)).

    If k > n the level is not attainable with n points: the largest ratio is used, and attainable is n/(n + 1).

    Raises:
        DataError: no calibration point, unequal lengths, or values that are not finite.
    """
    error = np.abs(np.asarray(errors, dtype=float)).ravel()
    u = np.asarray(uncertainties, dtype=float).ravel()
    if len(error) != len(u) or len(u) == 0:
        raise DataError(
            f"Conformal calibration needs one error per uncertainty and at least one, got {len(error)} and {len(u)}."
        )
    if not (np.isfinite(error).all() and np.isfinite(u).all()):
        raise DataError("Conformal calibration got errors or uncertainties that are not finite numbers.")
    n = len(u)
    ratios = np.sort((error + EPSILON) / (u + EPSILON))
    # (n + 1)(1 - alpha) can be an integer that float arithmetic overshoots (20 * 0.95): round before the ceiling.
    k = math.ceil(round((n + 1) * (1.0 - alpha), 9))
    if k > n:
        return ConformalScale(float(ratios[-1]), alpha, n / (n + 1), n)
    return ConformalScale(float(ratios[max(k, 1) - 1]), alpha, 1.0 - alpha, n)
