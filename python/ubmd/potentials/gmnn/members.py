"""Training of the networks that a kind of uncertainty needs: one, or the members of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ase import Atoms

from ubmd.potentials.gmnn.history import Row
from ubmd.potentials.gmnn.trainer import TrainedModel, train
from ubmd.potentials.members import counting_members, member_folders, member_seed
from ubmd.settings import ModelSettings, TrainingSettings


def train_members(
    count: int,
    model_settings: ModelSettings,
    training_settings: TrainingSettings,
    training: Sequence[Atoms],
    validation: Sequence[Atoms],
    folder: Path,
    seed: int,
    initial: Sequence[Path] | None = None,
    epochs: int | None = None,
    progress: Callable[[Row], None] | None = None,
    fresh: bool = False,
) -> list[TrainedModel]:
    """Train ``count`` networks on the same data, one after the other, each with its own seed and folder.

    The arguments are those of `trainer.train`, with one weights file per network in ``initial``; ``progress`` counts
    the epochs of all of them. Networks that an interrupted call has finished are not trained again.
    """
    folders, seeds = member_folders(folder, count), [member_seed(seed, m) for m in range(count)]
    starts: Sequence[Path | None] = initial or [None] * count
    results = []
    for m, (where, own_seed, start) in enumerate(zip(folders, seeds, starts, strict=True)):
        report = counting_members(progress, m, count)
        results.append(
            train(
                model_settings,
                training_settings,
                training,
                validation,
                where,
                own_seed,
                initial=start,
                epochs=epochs,
                progress=report,
                fresh=fresh,
            )
        )
    return results
