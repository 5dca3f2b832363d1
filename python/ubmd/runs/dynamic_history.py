"""What a dynamic run leaves in its folder, and how to read it.

    settings.toml, manifest.json, events.jsonl, report/    as for every run (`ubmd.runs.folder`); the report is
                       made by `ubmd.analysis.dynamic_report.make_dynamic_report(run)`, which returns its files
    dataset.extxyz     all labels in the order in which they were learnt; info: label (0, 1, ...), iteration (round that
                       asked, -1: start), replica, step, temperature (K), rule, predicted_error (eV/Å, before learning,
                       four digits)
    rejected.extxyz    structures without a label; info has the reason
    test.extxyz        test set, if there is one
    model.pt           newest model
    basis.npz, posterior.npz   cluster basis and newest posterior (force constants; `ClusterBasis.load`,
                       `Posterior.load`); the model after the first k labels is made again from dataset[:k]
    history.json       list with one entry per round, see below
    errors_RRR.npz     error series of replica RRR (`read_errors`)
    rounds/round_NNNN/ pieces of the trajectories (piece_RRR.npz), labels/, and the newest round's model

A round: a model (refitted if there are new labels), one piece of every replica's trajectory with it, signals of
convergence, labels for those replicas that asked. An entry of history.json::

    round           0, 1, ...
    labels          labels that the model of this round has learnt
    calls           structures that the reference was asked for so far (labels and rejected ones)
    md_steps        MD steps of all replicas so far, this round's included
    refit           whether the model is new in this round
    learnt          list, one item per label that this model has learnt and the one before had not:
                      label, replica, temperature (K), step (of that replica's trajectory), rule ('start', 'absolute',
                      'average', 'history' or 'guard'), threshold (eV/Å, null for start and guard),
                      error_before   predicted by the model that had not seen it, eV/Å (null for start)
                      true_before    largest |ΔF| of a component with that model, eV/Å (null for start)
                      rms_before     root mean square ΔF with that model, eV/Å (null for start)
                      error_after, true_after, rms_after   the same with this round's model
                      drop           predicted relative drop of the mean error by learning it (null if not computed)
    model           of force constants: noise (1/sqrt(β), eV/Å), alpha, gamma, parameters (by order: '2', '3', ...),
                    beta (by channel), log_evidence, converged, iterations, energy (eV per primitive cell, null:
                    unknown), force_scale (conformal factor in use, 1 without dynamic.calibrate);
                    of networks: noise 0, force_scale, epochs
    train, test     force_rmse (eV/Å), force_rms (of the labels, eV/Å), relative (their ratio), structures;
                    networks also have energy_rmse_mev_per_atom; test only with a test set
    conformal       scale, alpha, attainable, count: factor that covers 1 - alpha of the true errors of the newest
                    labels, each predicted before it was learnt; null before the first
    replicas        list: replica, temperature (K), begin and end (steps of its trajectory), ended ('asked', 'segment',
                    'guard', 'failed'), reason, max_error and mean_error (eV/Å, null without a check),
                    max_displacement (Å; 0 for networks), bias_share (|F_bias|/|F|), ms_per_step
    asked           list, what the reference was asked for: as in learnt, without 'after', plus rejected (reason, '' if
                    labelled); the labelled ones are in the next entry's learnt
    passed          list: replicas that asked but whose frame others made superfluous (dynamic.batch)
    fresh_steps     steps of all replicas since the last refit: what the signals have seen
    signals         list of `Signal` of `ubmd.potentials` as JSON (name, holds, value, threshold, reason, evidence)
    converged       whether all three hold
    ended           rule ('converged', 'labels', 'steps') and reason; only in the last entry of a finished run
    seconds         wall time by stage (learn, md, label), s
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
    """[C] steps at which the replica asked"""

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
