"""What worker processes do for the loop: look at the reference, label, run reference MD, run MD, train.

Each task leaves its result in a file and seals it (`ubmd.files.seal`): what a worker has finished stays
finished, also if the driver is killed before it hears of it. A worker that labels molecules imports no torch.

Several processes may work on the same task: a worker on another machine continues without its driver while the next
driver starts the task again. The first to finish counts; MD and trainings that another process has started again end
early (`ubmd.attempts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ase import Atoms
from pydantic import BaseModel

from ubmd.attempts import Attempt, TakenOver
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.files import file_hash, is_sealed, json_text, read_json, seal, write_text
from ubmd.lammps.engine import ALONE, Company
from ubmd.learning.work.inside import Reply, guarded, mend_process
from ubmd.learning.work.workers import WorkersLost
from ubmd.process import keep_freed_memory
from ubmd.settings import ModelSettings, ReferenceSettings, SamplingSettings, TrainingSettings

if TYPE_CHECKING:
    from ubmd.lammps.engine import MDEngine, ReplicaResult, ReplicaTask
    from ubmd.potentials.history import Row

Task = TypeVar("Task")
Result = TypeVar("Result", bound=BaseModel)


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
    """A task that another process has started again has not failed: it may be submitted again for its result."""
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


@dataclass(frozen=True)
class MDJob(Generic[Task, Result]):
    """A task of an MD engine, and the file that notes how it has ended: also for drivers that come later."""

    engine: MDEngine[Task, Result]
    task: Task
    key: str
    """of everything that decides the result"""
    finished: Path
    """the note (JSON): key of the task, hash of its output, and its result"""
    shares: bool = False
    """whether it shares a process with others, if there are any (replicas; see `ubmd.lammps.group`)"""

    def run(self, company: Company = ALONE) -> Result:
        """Run the task, and note how it ended; one that has ended is not run again.

        ``company``: tasks that it shares this process with.

        Raises:
            SimulationError: it could not be started.
            WorkersLost: another process has begun the same task.
        """

        def note(attempt: Attempt, result: Result) -> None:
            attempt.put_text(self._note(result), self.finished)

        with lost_if_taken_over():
            return self.kept() or self.engine.run(self.task, note, company)

    def kept(self) -> Result | None:
        """The noted result, or None if there is none for this very task, or its output is damaged."""
        try:
            noted = read_json(self.finished)
            whole = noted["task"] == self.key and noted["sha256"] == file_hash(self.engine.output(self.task))
            return self.engine.result_type.model_validate(noted["result"]) if whole else None
        except (OSError, ValueError, KeyError):
            return None

    def salvage(self, reason: str, **changes: Any) -> Result:
        """Keep what a failed or lost task has left behind, and note its result with these fields changed."""
        result = self.engine.salvage(self.task, reason).model_copy(update=changes)
        write_text(self.finished, self._note(result))
        return result

    def _note(self, result: Result) -> str:
        output = file_hash(self.engine.output(self.task))
        return json_text({"task": self.key, "sha256": output, "result": result.model_dump()})


def run_md(job: MDJob[Any, Result]) -> Result:
    """`MDJob.run` in a worker."""
    return job.run()


def run_together(*jobs: tuple[MDJob[ReplicaTask, ReplicaResult]]) -> list[Reply]:
    """`MDJob.run` of several replicas in a worker, at once if they share a process; a reply for each."""
    replicas = [job for (job,) in jobs]
    if not all(job.shares for job in replicas):
        return [guarded(job.run) for job in replicas]
    from ubmd.lammps.group import run_at_once

    return run_at_once(replicas[0].task.model, [partial(guarded, job.run) for job in replicas])


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
    base: Path,
) -> None:
    """Train one network of an ensemble on the structures in two files.

    ``base``: folder of the settings file, for a back end that is beside it.

    Raises:
        TrainingError: the training diverged.
        WorkersLost: another process has begun the same training.
    """
    from ubmd.potentials.interface import Labels, TrainingTable
    from ubmd.potentials.kinds import backend_of
    from ubmd.potentials.members import train_network

    backend = backend_of(model, base)
    weights = folder / backend.checkpoint
    if is_sealed(weights, key):
        return
    keep_freed_memory()
    sets = read_structures(training, labelled=True), read_structures(validation, labelled=True)
    attempt = Attempt.begin(weights)

    def watch(_: Row) -> None:
        attempt.check()

    try:
        with lost_if_taken_over():
            train_network(backend, Labels(*sets), TrainingTable(model, options, epochs), folder, initial, seed, watch)
            attempt.check()
            seal(weights, key)
    finally:
        attempt.end()
