"""What all potentials have in common: what they predict, and when one is converged."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Prediction:
    """What a model says about one structure.

    energy: eV; forces: [n, 3] eV/Å; stress: [6] eV/Å^3, ASE order (None without a cell; of crystals what exceeds the
    stress of the ideal one); u: calibrated structure uncertainty, eV/atom; atomic_u: [n] calibrated, eV/Å; feature: [p]
    structure feature, divided by the model's feature scale so that lambda2 of its settings applies. Of crystals it is
    Wᵀφ (S = W Wᵀ is the posterior covariance, φ the mean derivative of the energy by the parameters), whose length is
    the uncalibrated u.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None
    u: float
    atomic_u: np.ndarray
    feature: np.ndarray


@dataclass(frozen=True)
class Signal:
    """One signal of convergence."""

    name: str
    """'determined', 'below noise' or 'little to gain'"""
    holds: bool
    value: float
    threshold: float
    reason: str
    """one sentence"""
    evidence: dict[str, Any]
    """the numbers that it saw, as JSON values"""

    def as_json(self) -> dict[str, Any]:
        """For events and history."""
        return asdict(self)


def converged(signals: Sequence[Signal]) -> bool:
    """All three signals are there and hold."""
    return {s.name for s in signals} == {"determined", "below noise", "little to gain"} and all(
        s.holds for s in signals
    )
