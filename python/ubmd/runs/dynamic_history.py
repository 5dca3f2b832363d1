"""What a dynamic run leaves in its folder, and how to read it.

    settings.toml, manifest.json, events.jsonl, report/    as for every run (`ubmd.runs.folder`); the report is
                       made by `ubmd.analysis.dynamic_report.make_dynamic_report(run)`, which returns its files
    dataset.extxyz     all labels in the order in which they were learnt; info: label (0, 1, ...), iteration (round of
                       the request, -1: start), replica, step, temperature (K), rule, predicted_error (eV/Å, before
                       learning, four digits)
    rejected.extxyz    structures without a label; info has the reason
    test.extxyz        test set, if there is one
    model.pt           newest model
    basis.npz, posterior.npz   cluster basis and newest posterior (force constants; `ClusterBasis.load`,
                       `Posterior.load`); the model after the first k labels is made again from dataset[:k]
    history.json       list with one entry per round, see `ubmd.runs.records`
    errors_RRR.npz     error series of replica RRR (`read_errors`)
    rounds/round_NNNN/ segments of the trajectories (piece_RRR.npz), labels/, and the newest round's model

A round: a model (refitted if there are new labels), one segment of every replica's trajectory with it, signals of
convergence, labels for those replicas that requested one. `ubmd.runs.records.RoundEntry` says what its entry in
history.json has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ubmd.files import replacing


@dataclass(frozen=True)
class ErrorSeries:
    """Errors along one replica's trajectory, one value per check."""

    step: NDArray[np.int64]
    """[N] step of the replica's trajectory"""
    error: NDArray[np.float64]
    """[N] eV/Å, as the trigger saw them"""
    threshold: NDArray[np.float64]
    """[N] that the trigger compared with, eV/Å"""
    mean: NDArray[np.float64]
    """[N] average along the trajectory of the current model, eV/Å; NaN for rules without one and at its start"""
    labels: NDArray[np.int64]
    """[N] labels that the model had learnt"""
    calls: NDArray[np.int64]
    """[C] steps at which the replica requested a label"""

    def save(self, path: Path) -> None:
        """Write an npz file."""
        with replacing(path) as handle:
            np.savez_compressed(handle, **vars(self))


def error_file(run: Path, replica: int) -> Path:
    """Where the error series of a replica is."""
    return Path(run) / f"errors_{replica:03d}.npz"


def read_errors(run: Path) -> dict[int, ErrorSeries]:
    """Replica -> error series of a run."""
    series = {}
    for path in sorted(Path(run).glob("errors_*.npz")):
        with np.load(path) as data:
            series[int(path.stem.removeprefix("errors_"))] = ErrorSeries(**{name: data[name] for name in data.files})
    return series
