"""What worker processes do for the loop: look at the reference, label, run reference MD, run a replica, train.

Each task leaves its result in a file and seals it (`ubmd.learning.run_folder.seal`): what a worker has finished stays
finished, also if the driver is killed before it hears of it. A worker that labels imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubmd.data.structures import read_structures, write_structures
from ubmd.learning.inside import mend_process
from ubmd.learning.run_folder import file_hash, seal, write_json
from ubmd.settings import ModelSettings, ReferenceSettings, SamplingSettings, TrainingSettings

if TYPE_CHECKING:
    from ubmd.lammps.replica import ReplicaResult, ReplicaTask


def label_file(source: Path, target: Path, key: str, settings: ReferenceSettings, base: Path) -> None:
    """Label the structure in ``source`` and write it to ``target``.

    Raises:
        LabelError: the reason for a rejection.
        SettingsError: the calculator cannot be made.
    """
    from ubmd.references import label

    labelled = label(read_structures(source)[0], settings, base)
    mend_process()
    write_structures(target, [labelled])
    seal(target, key)


def reference_record(settings: ReferenceSettings, base: Path) -> dict[str, Any]:
    """Make the calculator of the labels, and say what it is; see `ubmd.references.origin.inspect_reference`.

    Raises:
        SettingsError: it cannot be imported or made.
    """
    from ubmd.references.origin import inspect_reference

    return inspect_reference(settings, base)


def sample_file(
    source: Path,
    target: Path,
    key: str,
    reference: ReferenceSettings,
    sampling: SamplingSettings,
    base: Path,
    index: int,
) -> None:
    """Run trajectory ``index`` of a test set from the structure in ``source``; errors as for `label_file`."""
    from ubmd.references import sample_trajectory

    frames = sample_trajectory(read_structures(source, compare=False)[0], reference, sampling, base, index)
    mend_process()
    write_structures(target, frames)
    seal(target, key)


def replica_file(task: ReplicaTask, key: str, finished: Path) -> ReplicaResult:
    """Run a replica, and note in ``finished`` how it ended.

    Raises:
        SimulationError: it could not be started.
    """
    from ubmd.lammps.replica import run_replica

    result = run_replica(task)
    note_replica(task, key, finished, result)
    return result


def note_replica(task: ReplicaTask, key: str, finished: Path, result: ReplicaResult) -> None:
    """Write the result of a replica, the key of its task, and the hash of its frames."""
    write_json(finished, {"task": key, "sha256": file_hash(task.frames), "result": result.model_dump()})


def train_member(
    training: Path,
    validation: Path,
    folder: Path,
    key: str,
    model: ModelSettings,
    options: TrainingSettings,
    seed: int,
    initial: Path | None,
    epochs: int,
) -> None:
    """Train one network of an ensemble on the structures in two files.

    Raises:
        TrainingError: the training diverged.
    """
    from ubmd.training import train

    sets = read_structures(training, labelled=True), read_structures(validation, labelled=True)
    train(model, options, *sets, folder, seed, initial=initial, epochs=epochs)
    seal(folder / "weights.pt", key)
