"""What worker processes do for the loop: look at the reference, label, run reference MD, run a replica, train.

Each task leaves its result in a file and seals it (`ubmd.files.seal`): what a worker has finished stays
finished, also if the driver is killed before it hears of it. A worker that labels imports no torch.

Several processes may be at the same task: a worker on another machine goes on without its driver while the next driver
has the task done again. The first to finish counts; MD and trainings that another process has begun anew end early
(`ubmd.attempts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase import Atoms

from ubmd.attempts import Attempt, TakenOver
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.files import file_hash, is_sealed, json_text, read_json, seal, write_text
from ubmd.learning.work.inside import mend_process
from ubmd.learning.work.workers import WorkersLost
from ubmd.settings import ModelSettings, ReferenceSettings, SamplingSettings, TrainingSettings

if TYPE_CHECKING:
    from ubmd.lammps.replica import ReplicaResult, ReplicaTask
    from ubmd.potentials.gmnn.history import Row


def label_file(source: Path, target: Path, key: str, settings: ReferenceSettings, base: Path) -> None:
    """Label the structure in ``source`` and write it to ``target``.

    Raises:
        LabelError: the reason for a rejection.
        SettingsError: the calculator cannot be made.
    """
    from ubmd.references import label

    if not is_sealed(target, key):
        _keep(target, [label(read_structures(source)[0], settings, base)], key)


def _keep(target: Path, structures: Iterable[Atoms], key: str) -> None:
    """Write a result, unless another process has done so meanwhile: what may have been read already stays as it is."""
    mend_process()
    if not is_sealed(target, key):
        write_structures(target, structures)
        seal(target, key)


@contextmanager
def lost_if_taken_over() -> Iterator[None]:
    """A task that another process has begun anew is no failure: whoever still wants its result may ask again."""
    try:
        yield
    except TakenOver as error:
        raise WorkersLost(str(error)) from None


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

    if not is_sealed(target, key):
        start = read_structures(source, compare=False)[0]
        _keep(target, sample_trajectory(start, reference, sampling, base, index), key)


def replica_file(task: ReplicaTask, key: str, finished: Path) -> ReplicaResult:
    """Run a replica, and note in ``finished`` how it ended; one that has ended is not run again.

    Raises:
        SimulationError: it could not be started.
        WorkersLost: another process has begun the same replica.
    """
    from ubmd.lammps.replica import run_replica

    def note(attempt: Attempt, result: ReplicaResult) -> None:
        attempt.put_text(_note(task, key, result), finished)

    with lost_if_taken_over():
        return read_finished(task, key, finished) or run_replica(task, note)


def note_replica(task: ReplicaTask, key: str, finished: Path, result: ReplicaResult) -> None:
    """Write the result of a replica, the key of its task, and the hash of its frames."""
    write_text(finished, _note(task, key, result))


def _note(task: ReplicaTask, key: str, result: ReplicaResult) -> str:
    return json_text({"task": key, "sha256": file_hash(task.frames), "result": result.model_dump()})


def read_finished(task: ReplicaTask, key: str, finished: Path) -> ReplicaResult | None:
    """The kept result of a replica, or None if there is none for this very task, or its frames are damaged."""
    from ubmd.lammps.replica import ReplicaResult

    try:
        kept = read_json(finished)
        whole = kept["task"] == key and kept["sha256"] == file_hash(task.frames)
        return ReplicaResult.model_validate(kept["result"]) if whole else None
    except (OSError, ValueError, KeyError):
        return None


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
        WorkersLost: another process has begun the same training.
    """
    from ubmd.potentials.gmnn.trainer import train

    weights = folder / "weights.pt"
    if is_sealed(weights, key):
        return
    sets = read_structures(training, labelled=True), read_structures(validation, labelled=True)
    attempt = Attempt.begin(weights)

    def watch(_: Row) -> None:
        attempt.check()

    try:
        with lost_if_taken_over():
            train(model, options, *sets, folder, seed, initial=initial, epochs=epochs, progress=watch)
            attempt.check()
            seal(weights, key)
    finally:
        attempt.end()
