"""Autocorrelation functions and times of series with equal spacing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def autocorrelation(series: ArrayLike) -> Array:
    """Normalised autocorrelation C(t) [T, ...] of one or more series [T, ...] along the first axis; C(0) = 1.

    C(t) = Σ_k δ_k δ_{k+t} / ((T - t) σ^2), δ = x - mean(x), σ^2 the mean of δ^2; by FFT. NaN for a constant series.
    The estimator of Chodera et al., J. Chem. Theory Comput. 3, 26 (2007).
    """
    x = np.asarray(series, dtype=np.float64)
    length = len(x)
    spread = x - x.mean(axis=0)
    transformed = np.fft.rfft(spread, n=2 * length, axis=0)
    sums = np.fft.irfft(transformed * transformed.conj(), n=2 * length, axis=0)[:length]
    counts = np.arange(length, 0, -1).reshape(-1, *[1] * (x.ndim - 1))
    variance = np.mean(spread**2, axis=0)
    # Of a constant series, the rounding error of its mean remains.
    moves = variance > (1e-12 * np.abs(x).max(axis=0)) ** 2
    return sums / counts / np.where(moves, variance, np.nan)


def statistical_inefficiency(series: ArrayLike) -> Array:
    """g [...] of one or more series [T, ...]: T values are worth T/g independent ones (the effective sample size).

    g = 1 + 2 Σ_t (1 - t/T) C(t), summed up to the first t ≥ 1 with C(t) ≤ 0; at least 1; NaN for a constant series.
    The definition of Chodera et al., J. Chem. Theory Comput. 3, 26 (2007), which pymbar implements:
    statistical_inefficiency(x, mintime=0).
    """
    correlation = autocorrelation(series)
    length = len(correlation)
    lag = np.arange(length).reshape(-1, *[1] * (correlation.ndim - 1))
    ended = np.maximum.accumulate((correlation <= 0.0) & (lag > 0), axis=0)
    counted = ~ended & (lag > 0) & (lag < length - 1)
    terms = np.where(counted, (1.0 - lag / length) * correlation, 0.0)
    inefficiency = np.maximum(1.0 + 2.0 * terms.sum(axis=0), 1.0)
    return np.where(np.isnan(correlation[0]), np.nan, inefficiency)


class EffectiveSamples:
    """Values and effective sample sizes of several series [T_k, ...] of one quantity, one series at a time."""

    def __init__(self) -> None:
        self._values = 0
        self._effective: Array = np.zeros(())

    def add(self, series: ArrayLike) -> None:
        """Count one more series; those of a single value are ignored."""
        x = np.asarray(series, dtype=np.float64)
        if len(x) > 1:
            self._values += len(x)
            self._effective = self._effective + len(x) / statistical_inefficiency(x)

    def time(self, spacing: float) -> float:
        """Autocorrelation time spacing·N/ESS with N and ESS = Σ T_k/g_k of all series, in the unit of ``spacing``.

        Trailing axes (atoms, components) are averaged at the end. NaN without a series.
        """
        if not self._values:
            return float("nan")
        times = spacing * self._values / np.ravel(self._effective)
        times = times[np.isfinite(times)]
        return float(times.mean()) if len(times) else float("nan")


def autocorrelation_time(series: Iterable[ArrayLike], spacing: float) -> float:
    """Autocorrelation time of several series of one quantity; see `EffectiveSamples`."""
    samples = EffectiveSamples()
    for x in series:
        samples.add(x)
    return samples.time(spacing)


def mean_autocorrelation(series: Iterable[ArrayLike], longest: int) -> Array:
    """Mean C(t) [≤ longest] over several series [T_k, ...] and their trailing axes, weighted by pairs at each lag."""
    total, weight = np.zeros(longest), np.zeros(longest)
    for x in series:
        correlation = autocorrelation(x)
        columns = correlation.reshape(len(correlation), -1)
        mean = columns[:, np.isfinite(columns[0])].mean(axis=1)[:longest]
        pairs = np.arange(len(correlation), 0, -1)[:longest]
        total[: len(mean)] += pairs * mean
        weight[: len(mean)] += pairs
    return total[weight > 0] / weight[weight > 0]
