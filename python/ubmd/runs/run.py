"""A run folder as a Python object: what it has learnt so far, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ase import Atoms

from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.runs.event_records import Event, RunDone
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings_of
from ubmd.runs.reading import read_events, read_iterations, read_rounds
from ubmd.runs.records import IterationEntry, RoundEntry
from ubmd.runs.schedules import LOOP, schedule_of_run
from ubmd.settings import RunSettings
from ubmd.settings.dynamic import DynamicRunSettings


class Run:
    """The folder of a run, finished or not; nothing in it is changed.

    >>> run = ubmd.Run("copper")
    >>> run
    Run('copper'): 24 labels, ... iterations, finished
    >>> run.history[-1].labels
    24
    >>> len(run.dataset)
    24
    >>> run.model
    PosixPath('copper/model.pt')

    Raises:
        DataError: there is no run in the folder, or it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = RunFolder(Path(folder))
        if not self._folder.manifest.exists():
            raise DataError(f"There is no run in {folder}: it has no manifest.json.")
        self._schedule = schedule_of_run(self._folder)

    def __repr__(self) -> str:
        unit = "iteration" if self._schedule is LOOP else "round"
        count, labels = len(self.history), len(self.dataset)
        many = f"{labels} label{'s' * (labels != 1)}, {count} {unit}{'s' * (count != 1)}"
        return f"Run({str(self.folder)!r}): {many}, {'finished' if self.finished else 'not finished'}"

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self._folder.path

    @property
    def model(self) -> Path:
        """The newest model file, for `ubmd.Calculator`, `ubmd.evaluate` and ``pair_style ubmd``.

        Raises:
            DataError: no model has been trained yet.
        """
        if not self._folder.model.exists():
            raise DataError(f"The run in {self.folder} has no model yet.")
        return self._folder.model

    @property
    def settings(self) -> RunSettings | DynamicRunSettings:
        """All settings, with their defaults."""
        return read_settings_of(self._folder, self._schedule.settings)

    @property
    def history(self) -> list[IterationEntry] | list[RoundEntry]:
        """One entry per finished iteration (of a dynamic run: per round); `ubmd schema history` explains the fields."""
        return read_iterations(self._folder) if self._schedule is LOOP else read_rounds(self._folder)

    @property
    def dataset(self) -> list[Atoms]:
        """All labelled structures, in the order in which they were labelled (eV, eV/Å, eV/Å^3)."""
        return _structures(self._folder.dataset)

    @property
    def rejected(self) -> list[Atoms]:
        """Structures that got no label; ``info["reason"]`` says why."""
        return _structures(self._folder.rejected)

    @property
    def test_set(self) -> list[Atoms]:
        """The labelled structures of the test set; empty if there is none (yet)."""
        return _structures(self._folder.test)

    @property
    def finished(self) -> bool:
        """Whether the run has ended by one of its rules."""
        last = None
        for event in self.events():
            last = event if event.event in ("run_started", "run_done") else last
        return isinstance(last, RunDone)

    def events(self) -> Iterator[Event]:
        """What has happened, one after the other; `ubmd schema events` explains the fields.

        >>> sum(event.seconds for event in run.events() if event.event == "stage_done") > 1.0
        True
        """
        return read_events(self._folder)

    def report(self) -> Path:
        """Make the report, as `ubmd report` does; returns the page.

        Raises:
            DataError: the folder is damaged.
        """
        return self._schedule.report(self.folder, False)[-1]


def _structures(path: Path) -> list[Atoms]:
    return read_structures(path, compare=False) if path.exists() and path.stat().st_size else []
