"""Volumes of cells along trajectories, and errors by volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from ubmd.calculator import Prediction
from ubmd.measure.errors import error_summary

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SlowWave:
    """V(t) = mean + a sin(π t/T) + b cos(π t/T) + white noise: a wave of twice the run's length T."""

    mean: float
    """Å³ (as all lengths here, in the unit of the volumes)"""
    amplitude: float
    """sqrt(a² + b²), Å³"""
    curve: Array
    """the model without noise at the given times"""
    noise: float
    """standard deviation of the residual, Å³"""
    explained: float
    """share of the variance of V that the wave explains (no unit)"""

    def sample(self, seed: int) -> Array:
        """One series of the whole model, noise included."""
        return self.curve + self.noise * np.random.default_rng(seed).normal(size=len(self.curve))


def slow_wave(times: ArrayLike, volumes: ArrayLike) -> SlowWave:
    """Least-squares fit of a wave of twice the run's length to volumes [N] at times [N].

    Zaverkin et al., npj Comput. Mater. 10, 83 (2024), use it for slow oscillations of a cell, of which one run covers
    half a period.
    """
    t, v = np.asarray(times, dtype=np.float64), np.asarray(volumes, dtype=np.float64)
    phase = np.pi * (t - t[0]) / (t[-1] - t[0])
    basis = np.stack([np.ones_like(phase), np.sin(phase), np.cos(phase)], axis=1)
    weights, *_ = np.linalg.lstsq(basis, v, rcond=None)
    curve = basis @ weights
    variance = float(v.var())
    residual = v - curve
    return SlowWave(
        mean=float(weights[0]),
        amplitude=float(np.hypot(*weights[1:])),
        curve=curve,
        # Three numbers were fitted.
        noise=float(np.sqrt(np.sum(residual**2) / max(len(v) - 3, 1))),
        explained=1.0 - float(residual.var()) / variance if variance > 0.0 else 1.0,
    )


@dataclass(frozen=True)
class VolumeBin:
    """Errors of the structures with volumes in [low, high)."""

    low: float
    """Å³"""
    high: float
    """Å³"""
    structures: int
    errors: dict[str, float]
    """as `ubmd.analysis.error_summary` returns them; empty without structures"""


def errors_by_volume(
    structures: Sequence[Atoms], predictions: Sequence[Prediction], edges: ArrayLike
) -> list[VolumeBin]:
    """RMSE of energy, forces and stress in bins of the cell's volume.

    Args:
        structures: labelled cells. predictions: for them.
        edges: [K + 1] of the bins, Å³, ascending; the last edge belongs to the last bin.
    """
    volumes = np.array([atoms.get_volume() for atoms in structures])
    limits = np.asarray(edges, dtype=np.float64)
    owner = np.searchsorted(limits, volumes, side="right") - 1
    owner[volumes == limits[-1]] = len(limits) - 2
    bins = []
    for k in range(len(limits) - 1):
        chosen = np.flatnonzero(owner == k).tolist()
        errors = error_summary(structures, predictions, chosen) if chosen else {}
        bins.append(VolumeBin(float(limits[k]), float(limits[k + 1]), len(chosen), errors))
    return bins


def volume_edges(structures: Sequence[Atoms], bins: int = 8) -> Array | None:
    """Edges [bins + 1] of equal bins over the volumes of cells, Å³; None unless they are cells of different volumes."""
    if not structures or not all(atoms.pbc.all() for atoms in structures):
        return None
    volumes = np.array([atoms.get_volume() for atoms in structures])
    low, high = float(volumes.min()), float(volumes.max())
    return np.linspace(low, high, bins + 1) if high - low > 1e-3 * high else None
