"""Training of the networks that a kind of uncertainty needs: one, or the members of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ubmd.potentials.baseline import remainder
from ubmd.potentials.interface import Backend, Labels, Report, TrainingTable


def train_network(
    backend: Backend,
    labels: Labels,
    table: TrainingTable,
    folder: Path,
    start: Path | None,
    seed: int,
    report: Report | None = None,
) -> Path:
    """`Backend.train` on what the baseline of the settings leaves of the labels: no network is trained otherwise.

    Raises:
        SettingsError: the baseline does not fit the labels' elements, or the cutoff.
    """
    rest = Labels(remainder(labels.training, table.model), remainder(labels.validation, table.model))
    return backend.train(rest, table, folder, start, seed, report)


def train_networks(
    backend: Backend,
    count: int,
    table: TrainingTable,
    labels: Labels,
    folder: Path,
    seed: int,
    starts: Sequence[Path] | None = None,
    report: Report | None = None,
) -> list[Path]:
    """Train ``count`` networks on the same labels, one after the other, each with its own seed and folder.

    The arguments are those of `Backend.train`, with one checkpoint per network in ``starts``; ``report`` counts the
    epochs of all of them. Returns the checkpoints.
    """
    folders = member_folders(folder, count)
    given: Sequence[Path | None] = starts or [None] * count
    return [
        train_network(backend, labels, table, where, start, member_seed(seed, m), counting_members(report, m, count))
        for m, (where, start) in enumerate(zip(folders, given, strict=True))
    ]


def member_folders(folder: Path, count: int) -> list[Path]:
    """Where each network's weights, log and picture are: the folder itself if there is only one."""
    return [folder] if count == 1 else [folder / f"member_{m}" for m in range(count)]


def member_seed(seed: int, member: int) -> int:
    """Seed of a member; the first has the seed itself, so that it is the network of a training without ensemble."""
    return seed if member == 0 else int(np.random.SeedSequence([seed, 3, member]).generate_state(1)[0])


def counting_members(progress: Report | None, member: int, count: int) -> Report | None:
    """A callback that counts the epochs of all members."""
    if progress is None:
        return None

    def report(row: dict[str, Any]) -> None:
        epochs = row["epochs"]
        progress({**row, "epoch": row["epoch"] + member * epochs, "epochs": count * epochs})

    return report
