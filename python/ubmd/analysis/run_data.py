"""The content of a run folder as reports need it: its history, and frames in the order in which the MD reached them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.measure.coverage import coverage_growth
from ubmd.measure.torsions import torsions
from ubmd.runs.folder import RunFolder
from ubmd.runs.reading import read_iterations
from ubmd.runs.records import IterationEntry, Record
from ubmd.runs.stage_names import STAGE_NAMES
from ubmd.settings import Table

S = TypeVar("S", bound=Table)
E = TypeVar("E", bound=Record)


class RunData(Generic[S, E]):
    """What the sections of a report read, each once; each kind of run adds its own."""

    def __init__(self, folder: RunFolder, settings: S, history: list[E], timestep: float) -> None:
        """``timestep``: of the MD, fs."""
        self.folder = folder
        self.settings = settings
        self.history = history
        self._timestep = timestep

    @property
    def last(self) -> E:
        """Newest entry of the history."""
        return self.history[-1]

    @cached_property
    def rejected(self) -> list[Atoms]:
        """Structures without a label; ``info["reason"]`` says why."""
        path = self.folder.rejected
        return _read(path) if path.exists() else []

    def picture(self, name: str) -> Path:
        """Where a picture is written."""
        return self.folder.report / name

    def picoseconds(self, steps: Any) -> Any:
        """Steps of the MD, one number or an array of them, as time."""
        return np.asarray(steps, dtype=float) * self._timestep / 1000.0


@dataclass(frozen=True)
class Frames:
    """All stored MD frames of a run, sorted by iteration, then by step (the replicas run side by side)."""

    structures: list[Atoms] = field(repr=False)
    iteration: NDArray[np.int64]
    """[N]"""
    replica: NDArray[np.int64]
    """[N]"""
    step: NDArray[np.int64]
    """[N] step of the frame's replica"""
    md_steps: NDArray[np.int64]
    """[N] MD steps of all replicas and iterations up to the moment of the frame"""
    max_u: NDArray[np.float64]
    """[N] max_i u_i, eV/Å"""

    def __len__(self) -> int:
        return len(self.structures)

    def coverage_curve(self, indices: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(MD steps [M], coverage [M]) of these torsions, one point per distinct number of MD steps."""
        grown = coverage_growth(torsions(self.structures, indices))
        last = np.append(np.flatnonzero(np.diff(self.md_steps)), len(self) - 1) if len(self) else np.zeros(0, int)
        return self.md_steps[last], grown[last]

    def volumes(self) -> NDArray[np.float64] | None:
        """Volume per atom [N], Å³; None unless there are cells whose volume changes."""
        if not len(self) or not all(atoms.pbc.all() for atoms in self.structures):
            return None
        volume = np.array([atoms.get_volume() / len(atoms) for atoms in self.structures])
        return volume if np.ptp(volume) > 1e-6 * volume.mean() else None


def stage_seconds(run: Path, history: Sequence[IterationEntry]) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """(names of the iterations, stage -> wall time of each, s); what came before the loop is called 'start'."""
    marks = sorted((Path(run) / ".stages").glob("*.json"))
    records = {mark.stem: json.loads(mark.read_text()) for mark in marks}
    start = {stage: float(record["seconds"]) for stage, record in records.items() if "seconds" in record}
    columns = [start, *(entry.seconds for entry in history)]
    found = {stage for column in columns for stage in column}
    order = [stage for stage in STAGE_NAMES if stage in found] + sorted(found - set(STAGE_NAMES))
    names = ["start", *(str(entry.iteration) for entry in history)]
    return names, {stage: np.array([float(column.get(stage, 0.0)) for column in columns]) for stage in order}


def count_endings(entry: IterationEntry) -> Counter[str]:
    """How the replicas of an iteration ended -> their number."""
    return Counter(result.stopped for result in entry.replicas)


def read_frames(run: Path) -> Frames:
    """Frames of all finished iterations of a run folder."""
    structures: list[Atoms] = []
    rows: list[tuple[int, int, int, int, float]] = []
    before = 0
    for entry in read_iterations(RunFolder(run)):
        folder = RunFolder(run).iteration(entry.iteration)
        found = [atoms for path in sorted(folder.glob("frames_*.extxyz")) for atoms in _read(path)]
        found.sort(key=lambda atoms: (int(atoms.info["step"]), int(atoms.info["replica"])))
        last = _last_steps(found)
        for atoms in found:
            step, replica = int(atoms.info["step"]), int(atoms.info["replica"])
            total = before + sum(min(step, end) for end in last.values())
            rows.append((entry.iteration, replica, step, total, float(atoms.info.get("max_uncertainty", np.nan))))
        structures += found
        # Replicas that outlive their iteration (asynchronous runs) count with the frames of where they began.
        before = max(entry.md_steps, rows[-1][3] if rows else 0)
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    whole = table[:, :4].astype(np.int64)
    return Frames(structures, whole[:, 0], whole[:, 1], whole[:, 2], whole[:, 3], table[:, 4])


def value_or_nan(value: float | None) -> float:
    """A number; NaN for None."""
    return float("nan") if value is None else float(value)


def _read(path: Path) -> list[Atoms]:
    """Frames of a file; replicas that failed at once leave empty files."""
    if path.stat().st_size == 0:
        return []
    return list(ase.io.iread(path, index=":", format="extxyz"))


def _last_steps(frames: list[Atoms]) -> dict[int, int]:
    """Replica -> step of its last frame."""
    last: dict[int, int] = {}
    for atoms in frames:
        replica, step = int(atoms.info["replica"]), int(atoms.info["step"])
        last[replica] = max(step, last.get(replica, 0))
    return last
