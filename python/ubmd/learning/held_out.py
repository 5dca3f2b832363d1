"""The test set of a run: a given file, or reference MD. Nothing that the loop decides depends on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from ubmd.data.constraints import is_fixed
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.state import bare, state_hash
from ubmd.data.structures import Contents, read_contents, read_structures
from ubmd.errors import DataError, LabelError, MachineError, SettingsError, UbmdError
from ubmd.files import check_space, content_hash, copy_file, is_sealed, read_json, write_json
from ubmd.learning.labels import reference_key
from ubmd.learning.work.groups import TaskGroup, note_losses
from ubmd.learning.work.tasks import sample_file
from ubmd.learning.work.workers import Executor, WorkersLost
from ubmd.runs.folder import EventLog, RunFolder
from ubmd.runs.stages import Stages, prepare_folder
from ubmd.settings import ReferenceSettings, SamplingSettings, TestSettings, WorkerSettings
from ubmd.settings.marks import key_values


class Tested(Protocol):
    """Settings of a run that may have a test set."""

    @property
    def labels(self) -> dict[str, str]: ...
    @property
    def test(self) -> TestSettings | None: ...
    @property
    def reference(self) -> ReferenceSettings: ...
    @property
    def workers(self) -> WorkerSettings: ...


class HeldOut:
    """A test set that is being made: `begin` starts reference MD in workers, `finish` waits for it.

    A file that ``test.file`` names is taken as it is. If it isn't there, reference MD makes it; a note beside it keeps
    the hash of reference, sampling and start structure, so that several runs share it and none uses a wrong one.
    """

    def __init__(
        self, settings: Tested, start: Atoms, folder: RunFolder, base: Path, workers: Executor, events: EventLog
    ) -> None:
        """``settings.test`` must not be None; ``base``: folder that its file is relative to."""
        assert settings.test is not None
        self._sampling = settings.test.sampling
        self._reference = settings.reference
        self._start = bare(start, settings.reference.info)
        held = np.flatnonzero(is_fixed(start))
        self._start.set_constraint(FixAtoms(held) if len(held) else None)  # reference MD keeps these fixed
        self._folder = folder
        self._base = base
        self._events = events
        self._given = base / settings.test.file if settings.test.file is not None else None
        self._labels = settings.labels
        given = [reference_key(settings.reference), key_values(self._sampling), dataset_hash([start])]
        state, fixed = state_hash(start, settings.reference.info), held.tolist()
        self._key = content_hash(given + ([[state, fixed]] if state or fixed else []))
        # The time-out of a label holds for every step.
        steps = self._sampling.equilibration + self._sampling.frames * self._sampling.stride
        timeout = settings.reference.timeout * max(1, steps)
        lost = note_losses(events, "trajectory")
        self._group = TaskGroup(workers, sample_file, timeout, settings.workers.retries, lost=lost)
        # With fewer frames than trajectories the last ones have no share.
        count = min(self._sampling.trajectories, self._sampling.frames)
        self._parts = [folder.path / "test" / f"trajectory_{k:03d}.extxyz" for k in range(count)]
        self._once = Stages(folder.path, events, {})
        self._finished = False

    def begin(self) -> None:
        """Submit what is missing.

        Raises:
            SettingsError: the file was made with other settings.
            DataError: it cannot be used.
        """
        if self._given is not None and self._given.exists():
            self._check_note(self._given)
            self._take(self._given)
            self._finished = True
        elif not self._once.is_done("test_set", self._key):
            prepare_folder(self._folder.path / "test", self._key)
            source = self._folder.path / "test" / "start.extxyz"
            write_structures(source, [self._start])
            fixed = self._key, self._reference, self._sampling, self._base
            self._group.add(
                {k: (source, p, *fixed, k) for k, p in enumerate(self._parts) if not is_sealed(p, self._key)}
            )

    def _take(self, given: Path) -> None:
        """Put a given file into the run folder: as it is, unless its labels are under keys or in units of their own."""
        structures = read_test_set(given, self._labels).structures
        if _is_plain(given, structures):
            copy_file(given, self._folder.test)
        else:
            write_structures(self._folder.test, structures)

    def finish(self) -> None:
        """Wait for the trajectories; then the test set is in the run folder. Does nothing the second time.

        Raises:
            LabelError: a trajectory failed (with its reason).
        MachineError: a trajectory was lost, by a fault of the machine.
        """
        if self._finished:
            return
        self._once.run("test_set", self._key, [self._folder.test], self._collect)
        if self._given is not None:
            self._given.parent.mkdir(parents=True, exist_ok=True)
            note = {"made_by": "ubmd run", "key": self._key, "reference": reference_key(self._reference)}
            write_json(_note(self._given), note)
            copy_file(self._folder.test, self._given)
        self._finished = True

    def _check_note(self, given: Path) -> None:
        """SettingsError if the file was made by a run with another reference, sampling or start structure.

        A run that does not say how its test set is to be made takes that of any run with its reference.
        """
        note = read_json(_note(given)) if _note(given).exists() else {"key": self._key}
        same = note.get("reference") == reference_key(self._reference) and self._sampling == SamplingSettings()
        if note["key"] != self._key and not same:
            raise SettingsError(
                f"The test set {given} was made with other reference, sampling or start settings; "
                "delete it, or name another test.file."
            )

    def _collect(self) -> None:
        failed: list[UbmdError] = []

        def done(index: int, _: Any, error: UbmdError | None) -> None:
            if error is not None and is_sealed(self._parts[index], self._key):
                error = None  # only the reply was lost
            if error is not None:
                check_space(self._folder.path)
                text = f"Trajectory {index} of the test set failed: {error}"
                machine = isinstance(error, WorkersLost)
                failed.append(
                    MachineError(f"{text} Rerun the same command to resume.") if machine else LabelError(text)
                )
            self._events.write("trajectory_done", trajectory=index, why=str(error or ""))

        self._group.wait(done)
        if failed:
            raise failed[0]
        frames = [frame for part in self._parts for frame in read_structures(part, labelled=True, compare=False)]
        write_structures(self._folder.test, frames)


def given_test_set(
    settings: Tested,
    base: Path,
    remark: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Atoms]:
    """Structures in the file that ``test.file`` names; none if there is no test set, or it is yet to be made.

    Args:
        settings: of the run.
        base: folder that the file is relative to.
        remark: see `read_contents`.
        tell: called with the sentence that says where the labels were taken from.

    Raises:
        DataError: a frame cannot be used.
    """
    test = settings.test
    if test is None or test.file is None or not (base / test.file).exists():
        return []
    contents = read_test_set(base / test.file, settings.labels, remark)
    tell(f"{test.file}: {contents.taken}.")
    return contents.structures


def read_test_set(given: Path, labels: Mapping[str, str], remark: Callable[[str], None] = lambda _: None) -> Contents:
    """Contents of a test set; the labels of one that `ubmd run` has made are ubmd's, and not checked again."""
    made = _note(given).exists()
    return read_contents(given, {} if made else labels, labelled=True, compare=not made, remark=remark)


def _is_plain(given: Path, structures: list[Atoms]) -> bool:
    """Whether a file can be read as one of a run folder: extxyz with exactly these structures under ubmd's own keys."""
    if given.suffix.lower() not in (".xyz", ".extxyz"):
        return False
    try:
        return dataset_hash(read_structures(given, compare=False)) == dataset_hash(structures)
    except DataError:  # such as isolated atoms without forces, which are set aside otherwise
        return False


def _note(given: Path) -> Path:
    return given.with_name(given.name + ".json")
