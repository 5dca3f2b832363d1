"""What both kinds of runs share: how a driver locks the folder and ends, and how the data set grows.

An iteration is here also a round of dynamic training, and a walk is one execution of a run from its beginning, which
skips what is already done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor as StandardExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ase import Atoms

from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.state import bare, describe_state, structures_hash
from ubmd.errors import LabelError, MachineError, SettingsError, UbmdError
from ubmd.faults import is_full
from ubmd.files import content_hash, full_disk, read_json, write_json
from ubmd.learning.dataset import append_once, read_dataset
from ubmd.learning.held_out import HeldOut, Tested
from ubmd.learning.labels import (
    batch_is_whole,
    forget_rejections,
    free_lost,
    label_batch,
    mend_batch,
    read_batch,
    read_postponed,
    reference_key,
)
from ubmd.learning.work.executors import Adapter, forget_dead_drivers, make_executor
from ubmd.learning.work.groups import note_losses
from ubmd.learning.work.workers import Executor
from ubmd.process import torch_threads
from ubmd.references import energy_jumps
from ubmd.runs.folder import EventLog, Listener, RunFolder
from ubmd.runs.manifest import edited_files
from ubmd.runs.records import Record
from ubmd.runs.stages import Stages, prepare_folder
from ubmd.settings import WorkerSettings

LARGEST_FRUITLESS = 3  # consecutive iterations without a new label, after which a run stops

E = TypeVar("E", bound=Record)

START = -1
"""Number of the iteration that the first labels belong to, in the info of the data set."""


def drive(
    folder: RunFolder,
    settings: WorkerSettings,
    executor: StandardExecutor | None,
    begin: Callable[[Executor], Walk[Any]],
) -> None:
    """Execute a run with its folder locked; whatever ends it, its workers end too, and the events say why.

    Args:
        folder: of the run.
        settings: the workers, if there is no executor.
        executor: where tasks run.
        begin: makes the walk, when the folder is locked.

    Raises:
        StorageError: the disk is full, whatever the walk itself has raised.
    """
    walk: Walk[Any] | None = None
    with ExitStack() as stack:
        try:
            stack.enter_context(folder.locked())
            forget_dead_drivers(folder.path)
            given = Adapter(executor, folder.path) if executor is not None else None
            workers = given or make_executor(settings, folder.path)
            stack.callback(workers.stop)
            walk = begin(workers)
            with torch_threads(walk.threads):
                walk.run()
        except (KeyboardInterrupt, Exception) as error:
            reason: BaseException = full_disk(folder.path) if is_full(error) or folder.is_full() else error
            if walk is not None and isinstance(reason, KeyboardInterrupt | UbmdError):
                with suppress(OSError):
                    walk.events.write("run_stopped", why=str(reason) or "interrupted", kind=type(reason).__name__)
            raise reason from (None if reason is error else error)


class Walk(Generic[E]):
    """One execution of a run, iteration by iteration. The folder is locked; the workers live as long as this object.

    Attributes:
        unit: what an iteration is called in events and messages.
        settings: those of the current iteration.
        known: labels that the data set had when this execution started.
        dataset, rejected, history: the results so far.
        postponed: structures that the machine has lost, in the order in which they were; to be requested again.
    """

    unit: ClassVar[str]
    settings: Tested
    least_labels = 2
    """start structures that must get a label"""

    def __init__(
        self,
        base: Path,
        folder: RunFolder,
        workers: Executor,
        listener: Listener | None,
        threads: int,
        changes: dict[str, list[Any]],
        entry: type[E],
    ) -> None:
        """``changes``: of the settings since the last start, as `open_run` returns them; ``entry``: of the history."""
        self.base = base
        self.folder = folder
        self.workers = workers
        self.threads = threads
        self.events = EventLog(folder.events, listener)
        if changes:
            self.events.write("settings_changed", changes=changes)
        self._remark(edited_files(folder.read_manifest(), base))
        folder.mend_history(entry.read)
        self.known = read_dataset(folder.dataset)
        self.dataset: list[Atoms] = []
        self.rejected: list[Atoms] = []
        self.postponed: list[Atoms] = []
        self.history: list[E] = []
        self._entry = entry
        self._written: list[dict[str, Any]] = []  # the history as its file has it
        self._held_out: HeldOut | None = None
        self._fruitless = 0
        self._dataset_bytes = 0

    def run(self) -> None:
        """From the start structures to the report."""
        raise NotImplementedError

    def _remark(self, texts: Iterable[str]) -> None:
        """Tell the user something that is not an error."""
        for text in texts:
            self.events.write("remark", text=text)

    def _begin_test_set(self, start: Atoms) -> None:
        """Reference MD for the test set runs beside the first training."""
        if self.settings.test is not None:
            self._held_out = HeldOut(self.settings, start, self.folder, self.base, self.workers, self.events)
            self._held_out.begin()

    # -------------------------------------------------------------------------------------- labels

    def _label_start(self, candidates: list[Atoms]) -> None:
        """The first labels."""
        once = Stages(self.folder.path, self.events, {self.unit: START})
        reference, folder = self.settings.reference, self.folder.path / "start"
        key, stateless = (
            content_hash([hashed, reference_key(reference)])
            for hashed in (structures_hash(candidates, reference.info), dataset_hash(candidates))
        )
        mark = folder / "key"
        if key != stateless and mark.exists() and mark.read_text() == stateless:
            raise SettingsError(
                f"The run in {self.folder.path} was made by an earlier version of ubmd, which labelled its structures "
                f"without what the start structures have ({describe_state(candidates[0], reference.info)}): start "
                "again in another run_dir."
            )
        self._label(START, key, lambda: candidates, folder, once)

    def _label(self, number: int, key: str, candidates: Callable[[], list[Atoms]], folder: Path, once: Stages) -> None:
        """Label the batch of an iteration, and append it to the data set."""
        settings, done = self.settings, folder / "done.json"

        def report(index: int, reason: str) -> None:
            name = "label_rejected" if reason else "label_done"
            self.events.write(name, **{self.unit: number}, index=index, why=reason)

        def work() -> None:
            batch = candidates()
            again = sum("first_iteration" in atoms.info for atoms in batch)
            prepare_folder(folder, key)
            label_batch(
                batch,
                folder,
                settings.reference,
                self.base,
                self.workers,
                report,
                self._known_of(number),
                settings.workers.retries,
                note_losses(self.events, "label", **{self.unit: number}),
            )
            write_json(done, {"candidates": len(batch)} | ({"asked_again": again} if again else {}))

        self._mend_labels(number, folder)
        if done.exists() and not batch_is_whole(folder):
            done.unlink()
        once.run("label", key, [done], work)
        try:
            self._take(number, folder)
            if number == START:
                self._check_start_labels()
        except (LabelError, MachineError):
            # On resuming the reference has been fixed: its rejections must not end the run again.
            forget_rejections(folder)
            done.unlink()
            raise

    def _take(self, number: int, folder: Path) -> None:
        """Append a labelled batch; what it has postponed follows what was not requested again of earlier ones."""
        done = folder / "done.json"
        self._append(number, *read_batch(folder))
        again = read_json(done).get("asked_again", 0) if done.exists() else 0
        self.postponed = self.postponed[again:] + read_postponed(folder)

    def _ask_again(self, number: int, room: int) -> list[Atoms]:
        """The first postponed structures, at most ``room``, as candidates of an iteration."""
        copies = [bare(atoms, self.settings.reference.info) for atoms in self.postponed[: max(room, 0)]]
        for copy, atoms in zip(copies, self.postponed, strict=False):
            first = atoms.info.get("first_iteration", atoms.info["iteration"])
            copy.info |= {key: atoms.info[key] for key in ("replica", "step")}
            copy.info |= {"iteration": number, "first_iteration": first}
        return copies

    def _check_start_labels(self) -> None:
        """Stop if there are too few to begin with."""
        labelled, lost = len(self.dataset), len(self.postponed)
        if labelled >= self.least_labels:
            return
        have = f"Only {labelled} of {labelled + len(self.rejected) + lost} start structures could be labelled"
        if lost:
            raise MachineError(
                f"{have}, {lost} were lost by a fault of the machine or cluster: once the cause is fixed, rerun the "
                "same command to resume."
            )
        reason = self.rejected[0].info["reason"]
        raise LabelError(f"{have}, at least {self.least_labels} needed; the first reason: {reason}")

    def _known_of(self, number: int) -> list[Atoms]:
        """Labels of an iteration that the data set had when this execution started."""
        return [atoms for atoms in self.known if atoms.info["iteration"] == number]

    def _mend_labels(self, number: int, folder: Path) -> None:
        """Make a damaged batch whole again, from what the data set has of it.

        In the newest batch, what an earlier version rejected for a fault of the machine is requested again.
        """
        if not folder.exists():
            return
        if len(self.folder.read_history()) <= number + 1 and free_lost(folder):
            self._write_rejected()
            self._remark(["Structures that were rejected for a fault of the machine are requested again."])
        if not batch_is_whole(folder):
            mend_batch(folder, self._known_of(number), self.settings.reference)

    def _is_settled(self, number: int, once: Stages, stages_done: tuple[str, ...], key: str) -> bool:
        """Whether an iteration has ended and its labels are complete: then little else of it is still needed.

        Args:
            number: of the iteration.
            once: its stages.
            stages_done: those that must have been done with ``key``, that of its labels.
        """
        labels = once.folder / "labels"
        self._mend_labels(number, labels)
        return (
            all(once.is_done(name, key) for name in stages_done)
            and batch_is_whole(labels)
            and len(self.folder.read_history()) > number
        )

    def _append(self, number: int, labelled: list[Atoms], rejected: list[Atoms], at_once: int = 1) -> None:
        """Give labels their numbers, and write them behind the data set, one by one (or ``at_once``)."""
        jumps = energy_jumps(labelled, self.dataset, self.settings.reference.energy_limit) | self._refuse(labelled)
        for k, reason in jumps.items():
            labelled[k].calc = None
            labelled[k].info["reason"] = reason
        rejected = rejected + [labelled[k] for k in jumps]
        labelled = [atoms for k, atoms in enumerate(labelled) if k not in jumps]
        for k, atoms in enumerate(labelled):
            atoms.info["label"] = len(self.dataset) + k
        self._accept(number, labelled)
        self._dataset_bytes = append_once(
            self.folder.dataset,
            self._dataset_bytes,
            labelled,
            lambda k: self.events.write("label_appended", **{self.unit: number}, label=len(self.dataset) + k),
            at_once,
        )
        self.dataset += labelled
        if rejected:
            self.rejected += rejected
            self._write_rejected()
        if number > START:
            self._check_fruitful(labelled, rejected)

    def _write_rejected(self) -> None:
        if self.rejected:
            write_structures(self.folder.rejected, self.rejected)
        else:
            self.folder.rejected.unlink(missing_ok=True)

    def _refuse(self, labelled: list[Atoms]) -> dict[int, str]:
        """New labels that are not to be learnt: index -> one sentence with the reason."""
        return {}

    def _accept(self, number: int, labelled: list[Atoms]) -> None:
        """Called with new labels before they are written: adds to their ``info``."""

    def _check_fruitful(self, labelled: Sequence[Atoms], rejected: Sequence[Atoms]) -> None:
        """Stop after several consecutive iterations without a new label: the run would never end."""
        self._fruitless = 0 if labelled else self._fruitless + 1
        if self._fruitless == LARGEST_FRUITLESS:
            last = self.rejected[-1].info["reason"] if self.rejected else "no frame differed from the training set"
            what = f"{LARGEST_FRUITLESS} consecutive {self.unit}s without a new label"
            raise LabelError(f"{what}; the last reason: {last}")

    # -------------------------------------------------------------------------------------- history

    def _recall(self, number: int) -> E:
        """Add the entry of a finished iteration to the history, whatever version wrote it; returns it."""
        entry = self.folder.read_history()[number]
        self._written.append(entry)
        self.history.append(self._entry.read(entry))
        return self.history[-1]

    def _add_to_history(self, number: int, entry: dict[str, Any]) -> bool:
        """Append the entry of an iteration; returns whether the file did not have exactly this entry yet."""
        self.history.append(self._entry.model_validate(entry))
        self._written.append(entry)
        written = self.folder.read_history()
        if len(self._written) >= len(written):
            write_json(self.folder.history, self._written)
        return written[number : number + 1] != [entry]
