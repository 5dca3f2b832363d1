"""Calibration of a model's two uncertainties on structures that it was not trained on.

A factor per element is conformal prediction in groups (Mondrian: Vovk, Gammerman and Shafer, Algorithmic Learning in a
Random World, Springer, 2005, section 4.5). Weights: see `ubmd.uncertainty.conformal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ubmd.errors import DataError
from ubmd.uncertainty.conformal import EPSILON, ConformalScale, conformal_scale

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """A labelled structure, and what a model said of it that had not been trained on it. Fixed atoms are left out."""

    energy_error: float
    """|ΔE|/n, eV/atom"""
    energy_u: float
    """u before calibration, eV/atom"""
    numbers: NDArray[np.int64]
    """[n] atomic numbers"""
    errors: Array
    """[n] RMSE over x, y, z of F_i, eV/Å"""
    u: Array
    """[n] u_i before calibration, eV/Å"""
    weight: float = 1.0
    """in the calibration, beside the new structure's 1"""


@dataclass(frozen=True)
class Calibration:
    """The factors of a model file."""

    energy: ConformalScale
    forces: ConformalScale
    atom_scale: dict[int, float] | None = None
    """atomic number -> further factor of u_i; None: 1 for all, as of a single element"""


def calibrate(
    outcomes: Sequence[Outcome], alpha: float, by_structure: bool, elements: Sequence[int] | None = None
) -> Calibration:
    """Factors of u (energies) and u_i (forces).

    Args:
        outcomes: what they are calibrated on.
        alpha: miscoverage.
        by_structure: a structure counts once, with max_i error / max_i u, because atoms of one structure are not
            exchangeable and a threshold acts on the maximum; else each atom counts.
        elements: atomic numbers; each first gets a factor of its own, see `element_factors`. None: they do not.

    Raises:
        DataError: no structure, or numbers that are not finite.
    """
    if not outcomes:
        raise DataError("Calibration needs at least one structure.")
    weights = [outcome.weight for outcome in outcomes]
    energy = conformal_scale([o.energy_error for o in outcomes], [o.energy_u for o in outcomes], alpha, weights)
    factors = None if elements is None or len(elements) < 2 else element_factors(outcomes, alpha, elements)
    if factors is not None:
        outcomes = [replace(o, u=_of_atoms(factors, o.numbers) * o.u) for o in outcomes]
    moving = [outcome for outcome in outcomes if len(outcome.u)]
    if by_structure:
        moving = [replace(o, errors=o.errors.max(keepdims=True), u=o.u.max(keepdims=True)) for o in moving]
    return Calibration(energy, _over_atoms(moving, alpha), factors)


def element_factors(outcomes: Sequence[Outcome], alpha: float, elements: Sequence[int]) -> dict[int, float]:
    """Factors of u_i by element (atomic number), relative to that of all atoms.

    ln f_e = s ln(q_e/q): q_e is the conformal factor of the element's atoms, q that of all; s = min(1, N/n) with N the
    sum of weights of the structures that have such atoms, and n = 1/alpha - 1 the number that the confidence needs (19
    for 95 %), so that few structures change little. Atoms of one structure are alike: their number does not count.

    Raises:
        DataError: as of `conformal_scale`.
    """
    pooled = _over_atoms(outcomes, alpha).scale
    factors, needed = dict.fromkeys(elements, 1.0), 1.0 / alpha - 1.0
    for element in elements:
        own = [o for o in (_of_element(outcome, element) for outcome in outcomes) if len(o.u)]
        if own:
            share = min(1.0, sum(o.weight for o in own) / needed)
            factors[element] = max(_over_atoms(own, alpha).scale / pooled, EPSILON) ** share
    return factors


def _of_atoms(factors: Mapping[int, float], numbers: NDArray[np.int64]) -> Array:
    return np.array([factors[number] for number in numbers.tolist()])


def _of_element(outcome: Outcome, element: int) -> Outcome:
    chosen = outcome.numbers == element
    return replace(outcome, numbers=outcome.numbers[chosen], errors=outcome.errors[chosen], u=outcome.u[chosen])


def _over_atoms(outcomes: Sequence[Outcome], alpha: float) -> ConformalScale:
    """The conformal factor of all these atoms, each with the weight of its structure."""
    if not outcomes:
        raise DataError("Calibration of atomic uncertainties needs a structure with an atom that is not fixed.")
    weights = np.repeat([o.weight for o in outcomes], [len(o.u) for o in outcomes])
    errors, u = (np.concatenate([getattr(o, name) for o in outcomes]) for name in ("errors", "u"))
    return conformal_scale(errors, u, alpha, weights)
