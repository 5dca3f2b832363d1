"""Finished or unfinished runs, read for comparisons; runs that differ in their seed only are one group."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.analysis.predictions import NotKept, Unseen, predict, predict_unseen
from ubmd.analysis.provenance import setting_texts
from ubmd.analysis.run_data import Frames, read_frames
from ubmd.analysis.trajectory import Times, Trajectory, correlation_times, read_traces
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.measure.errors import CalibrationData, calibration_data, error_summary
from ubmd.measure.isomers import isomers
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings
from ubmd.runs.reading import read_iterations
from ubmd.runs.records import Errors, SetName
from ubmd.runs.schedules import LOOP, schedule_of_run
from ubmd.settings import RunSettings

Curve = tuple[NDArray[Any], NDArray[Any]]

# Keys by which runs of one group may differ: paths, parallelism, what is recorded, and the seed.
_SAME = (
    "seed",
    "run_dir",
    "workers",
    "test",
    "start.file",
    "training.threads",
    "training.checkpoint_every",
    "training.device",
    "md.trace_every",
    "md.device",
    "md.together",
)
ERRORS = {"energy RMSE": "meV/atom", "force RMSE": "eV/Å", "stress RMSE": "MPa"}
"""title -> unit of the errors, in the order of `Errors.rmse`"""


class Run:
    """One run, read when needed.

    Attributes:
        run_models: whether its model files may be run, where the folder lacks their predictions.
        lacks: why something is not shown; empty if everything is.

    Raises:
        DataError: the folder holds no run, one of another schedule, or none of its iterations has finished.
    """

    def __init__(self, path: Path, run_models: bool = False) -> None:
        self.folder = RunFolder(path)
        self.run_models = run_models
        self.lacks = ""
        schedule = schedule_of_run(self.folder)
        if schedule is not LOOP:
            raise DataError(
                f"{path} holds a {schedule.name} run, which can't be compared with others: see 'ubmd report {path}' "
                "for its errors against labels, or compare runs of active-learning loops only."
            )
        self.settings: RunSettings = read_settings(self.folder)
        self.history = read_iterations(self.folder)
        if not self.history:
            raise DataError(f"No iteration of the run in {path} has finished: there is nothing to compare yet.")

    @cached_property
    def frames(self) -> Frames:
        """All stored MD frames."""
        return read_frames(self.folder.path)

    def traces(self) -> Iterator[Trajectory]:
        """Trajectories at a short stride, one at a time; none without ``md.trace_every``."""
        return read_traces(self.folder.path)

    @cached_property
    def times(self) -> Times:
        """Autocorrelation times of the traces."""
        return correlation_times(self.traces())

    @cached_property
    def unseen(self) -> Unseen | None:
        """Predictions for structures that the models were not trained on; None if there are none."""
        try:
            return predict_unseen(self.folder, self.history, self.run_models)
        except NotKept as error:
            self.lacks = str(error)
            return None

    def errors(self) -> CalibrationData | None:
        """Errors and uncertainties on structures that the models were not trained on; None if there are none."""
        return calibration_data(self.unseen.structures, self.unseen.predictions) if self.unseen else None

    def isomer_errors(self, index: int = -1) -> dict[str, Errors]:
        """'trans', 'cis' -> errors of a model (place in the history) on these structures of the test set.

        Empty without a test set of a molecule with both isomers of its amide bonds, or without predictions for it.
        """
        found = isomers(self._tested) if self.folder.test.exists() else {}
        if not found:
            return {}
        try:
            made = predict(self.folder, self.history[index].iteration, self._tested, self.run_models)
        except NotKept as error:
            self.lacks = str(error)
            return {}
        return {name: Errors.read(error_summary(self._tested, made.each, chosen)) for name, chosen in found.items()}

    @cached_property
    def _tested(self) -> list[Atoms]:
        """The test set."""
        return read_structures(self.folder.test, labelled=True, compare=False)

    def minutes(self, index: int = -1) -> float:
        """Wall time of all stages until a model (place in the history) was there, min; nan if it is not known.

        The MD, selection and labels that an iteration does with its model belong to the next model.
        """
        last = range(len(self.history))[index]
        stages = [entry.seconds for entry in self.history[: last + 1]]
        made = {stage: seconds for stage, seconds in stages[-1].items() if stage in ("train", "export", "measure")}
        return sum(sum(part.values()) for part in (*stages[:-1], made)) / 60.0 if made else np.nan

    def by_time(self, curve: Curve) -> Curve:
        """A curve against MD steps as one against simulated time, ps."""
        return curve[0] * self.settings.md.timestep / 1000.0, curve[1]

    def by_labels(self, curve: Curve) -> Curve:
        """A growing quantity against MD steps as one against labels: what the MD had reached before each model."""
        steps = [0, *(entry.md_steps for entry in self.history)][: len(self.history)]
        grown = np.interp(steps, np.append(0, curve[0]), np.append(0.0, curve[1]))
        return np.array([entry.labels for entry in self.history]), grown


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and what they have in common."""

    groups: dict[str, list[Run]]
    set_name: SetName
    """set whose errors are compared: 'test' if every run has it, else 'valid'"""

    @property
    def runs(self) -> list[Run]:
        """All runs of all groups."""
        return [run for group in self.groups.values() for run in group]

    def each(self, function: Callable[[Run], Any]) -> dict[str, list[Any]]:
        """``function`` of every run, by group."""
        return {name: [function(run) for run in runs] for name, runs in self.groups.items()}

    def torsions(self) -> dict[str, tuple[int, ...]]:
        """Two torsions that all runs count coverage in; empty if there are none."""
        chosen = self.runs[0].settings.variables.torsions
        if len(chosen) < 2 or any(run.settings.variables.torsions != chosen for run in self.runs):
            return {}
        return dict(list(chosen.items())[:2])


def group_runs(runs: Sequence[Run], names: Sequence[str] | None = None) -> Comparison:
    """Runs by their settings without the seed.

    Args:
        runs: in any order.
        names: of the groups, in the order in which they first appear; by default made from the folders' names.

    Raises:
        DataError: there are more or fewer names than groups.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_identity(run.settings), sort_keys=True), []).append(run)
    if names is not None and len(names) != len(groups):
        raise DataError(
            f"--name: {len(names)} names for {len(groups)} groups: runs that differ in their seed only are one."
        )
    chosen = list(names) if names is not None else _names(list(groups.values()))
    tested = all(run.history[-1].test for run in runs)
    return Comparison(dict(zip(chosen, groups.values(), strict=True)), "test" if tested else "valid")


def _identity(settings: RunSettings) -> dict[str, str]:
    """Every key that distinguishes groups, with its value as text."""
    return {
        key: value
        for key, value in setting_texts(settings).items()
        if not any(key == name or key.startswith(name + ".") for name in _SAME)
    }


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Folder names; without the seed's number at their end for several runs of one group."""
    names = []
    for runs in groups:
        own = [run.folder.path.resolve().name for run in runs]
        bare = {re.sub(r"[ _.-]*(seed|s|run)?[ _.-]*\d+$", "", name) or name for name in own}
        names.append(bare.pop() if len(bare) == 1 and len(own) > 1 else own[0])
    return [name if names.count(name) == 1 else f"{name} ({k + 1})" for k, name in enumerate(names)]
