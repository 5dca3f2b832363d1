"""Three signals that a potential is converged, none of which needs further reference calculations.

Each is a pure function of numbers that its caller has at hand, and returns what it saw beside its verdict, so that all
three can be reported as they evolve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from ubmd.errors import DataError
from ubmd.potentials.interface import Signal


def determined(gamma: Mapping[int, float], counts: Mapping[int, int], threshold: float = 0.95) -> Signal:
    """The data determine nearly all parameters: γ/P above the threshold.

    γ is the number of well-determined parameters of MacKay, Neural Comput. 4, 415 (1992).

    Args:
        gamma: effective number of parameters by order.
        counts: number of parameters by order.
        threshold: of the share of all orders together.
    """
    if not counts or set(gamma) != set(counts) or min(counts.values()) < 1:
        raise DataError("The share of determined parameters needs gamma and a parameter count for the same orders.")
    value = float(sum(gamma.values()) / sum(counts.values()))
    reason = f"The data determine {100 * value:.1f} % of the parameters (threshold {100 * threshold:g} %)."
    evidence = {
        "gamma": {str(order): float(value) for order, value in gamma.items()},
        "parameters": {str(order): int(count) for order, count in counts.items()},
        "share": {str(order): float(gamma[order] / counts[order]) for order in counts},
    }
    return Signal("determined", value > threshold, value, threshold, reason, evidence)


def below_noise(epistemic: Iterable[ArrayLike], noise: float, fraction: float = 0.5) -> Signal:
    """The epistemic error of a new trajectory is well below the noise floor: more labels would only average out noise.

    Args:
        epistemic: standard deviations of the force components, one array [3n] per frame of a trajectory that no label
            was taken from, eV/Å.
        noise: 1/sqrt(β), eV/Å.
        fraction: rms deviation allowed, in units of the noise.
    """
    squares = np.array([np.mean(np.square(np.asarray(frame, dtype=float))) for frame in epistemic])
    if len(squares) == 0 or not np.isfinite(squares).all() or not noise > 0.0:
        raise DataError("The comparison with the noise needs a noise above zero and deviations of one frame or more.")
    value = float(np.sqrt(squares.mean()))
    threshold = fraction * noise
    reason = f"The rms epistemic force error of a new trajectory is {value:.3g} eV/Å, the noise {noise:.3g} eV/Å."
    evidence = {"rms": value, "noise": noise, "fraction": fraction, "frames": len(squares)}
    evidence["largest_frame_rms"] = float(np.sqrt(squares.max()))
    return Signal("below noise", value < threshold, value, threshold, reason, evidence)


def little_to_gain(drops: ArrayLike, threshold: float = 0.1) -> Signal:
    """Labelling even the best candidate is predicted to lower the mean Bayesian error by little.

    Args:
        drops: predicted relative drops by candidate (`regression.predicted_drops`).
        threshold: of the largest.
    """
    values = np.asarray(drops, dtype=float).ravel()
    if len(values) == 0 or not np.isfinite(values).all():
        raise DataError("The predicted drop needs at least one candidate and finite numbers.")
    best = int(np.argmax(values))
    value = float(values[best])
    reason = f"The best candidate is predicted to lower the mean Bayesian error by {100 * value:.1f} %."
    evidence = {"best": best, "candidates": len(values), "median": float(np.median(values))}
    return Signal("little to gain", value < threshold, value, threshold, reason, evidence)
