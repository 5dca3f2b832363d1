"""Trajectories with equal spacing, from traces of replicas or any file that ASE reads, and their correlation times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import ase.io
import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.calculator import Model
from ubmd.data.periodicity import perpendicular_cell
from ubmd.errors import DataError
from ubmd.measure.autocorrelation import EffectiveSamples
from ubmd.runs.folder import RunFolder
from ubmd.runs.reading import read_iterations

Array = NDArray[np.float64]

_FAR = 1e5  # Å
SHORTEST = 1.0
"""ps; shorter trajectories say nothing about correlation times"""


@dataclass(frozen=True)
class Trajectory:
    """T records of n atoms."""

    numbers: NDArray[np.int64]
    """atomic numbers [n]"""
    positions: Array
    """[T, n, 3], Å; in cells they may jump by cell vectors"""
    cells: Array | None
    """[T, 3, 3], Å, zeros along free directions; None for molecules"""
    spacing: float
    """time between records, ps"""
    max_u: Array | None = None
    """max_i u_i [T], eV/Å, where it is known"""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def duration(self) -> float:
        """ps"""
        return self.spacing * len(self)

    @property
    def volumes(self) -> Array | None:
        """Volume of the cell [T], Å³; None for molecules, slabs and wires."""
        return None if self.cells is None or not self._periodic().all() else np.abs(np.linalg.det(self.cells))

    def structures(self) -> list[Atoms]:
        """The records as ASE structures."""
        cells = [None] * len(self) if self.cells is None else self.cells
        pbc = self._periodic()
        return [Atoms(self.numbers, p, cell=c, pbc=pbc) for p, c in zip(self.positions, cells, strict=True)]

    def _periodic(self) -> NDArray[np.bool_]:
        """In which directions [3] it is periodic."""
        return np.zeros(3, dtype=bool) if self.cells is None else self.cells[0].any(axis=1)

    def internal_positions(self) -> Array:
        """Positions [T, n, 3] without rotation and shift of molecules, or without motion of the cell of crystals."""
        if self.cells is None:
            return aligned(self.positions)
        # along free directions a cell of a length that no atom crosses
        pbc = self._periodic()
        upright = [np.where(pbc[:, None], c, _FAR * perpendicular_cell(c, pbc)) for c in self.cells]
        return without_cell(self.positions, np.array(upright))

    def with_uncertainty(self, model: Path) -> Trajectory:
        """The same with max_i u_i from a model file."""
        predictions = Model(model).predict(self.structures())
        return replace(self, max_u=np.array([p.atomic_u.max() for p in predictions]))


def aligned(positions: Array) -> Array:
    """Positions [T, n, 3] shifted and rotated onto their mean structure (least squares, equal weights).

    Kabsch's rotation (Acta Cryst. A 32, 922 (1976)), onto the first record, then three times onto the mean.
    """
    centred = np.asarray(positions, dtype=np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    target = centred[0]
    for _ in range(4):
        left, _, right = np.linalg.svd(np.einsum("tna,nb->tab", centred, target))
        left[:, :, 2] *= np.linalg.det(left @ right)[:, None]  # never a mirror image
        moved: Array = np.einsum("tna,tab->tnb", centred, left @ right)
        target = moved.mean(axis=0)
    return moved


def without_cell(positions: Array, cells: Array) -> Array:
    """Positions [T, n, 3] in the mean cell: fractional coordinates, without jumps and common shift, times that cell.

    Neighbouring records must be less than half a cell vector apart.
    """
    fractional = np.einsum("tna,tab->tnb", positions, np.linalg.inv(cells))
    steps = np.diff(fractional, axis=0)
    unwrapped = fractional - np.concatenate([np.zeros_like(fractional[:1]), np.cumsum(np.round(steps), axis=0)])
    unwrapped -= unwrapped.mean(axis=1, keepdims=True)
    moved: Array = unwrapped @ np.mean(cells, axis=0)
    return moved


def read_trajectory(path: Path, spacing: float | None = None) -> Trajectory:
    """Read a trace of a replica (.npz), or any trajectory of one system that ASE reads (extxyz, LAMMPS dump, ...).

    Args:
        path: the file. ``max_uncertainty`` in the headers of extxyz frames is kept.
        spacing: time between records, ps; traces know it.

    Raises:
        DataError: no such file, no spacing, records that are not equally spaced or not of one system, or fewer than
            two.
    """
    path = Path(path)
    if not path.is_file():
        folder = f"{path} is a folder; name the trajectories in it."
        raise DataError(folder if path.is_dir() else f"There is no file {path}.")
    if path.suffix == ".npz":
        return _read_trace(path)
    if spacing is None:
        raise DataError(f"{path} does not contain the time between its frames; give it (--spacing, fs).")
    try:
        frames: list[Atoms] = list(ase.io.iread(path, index=":"))
    except Exception as error:  # ASE's readers raise anything from KeyError to AssertionError
        raise DataError(f"ASE cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}.") from error
    if len(frames) < 2 or any(len(atoms) != len(frames[0]) for atoms in frames):
        raise DataError(f"{path} must hold two or more frames of one system.")
    _check_spacing(path, [atoms.info["step"] for atoms in frames if "step" in atoms.info])
    known = all("max_uncertainty" in atoms.info for atoms in frames)
    return Trajectory(
        frames[0].numbers,
        np.array([atoms.positions for atoms in frames]),
        _cells(frames),
        spacing,
        np.array([atoms.info["max_uncertainty"] for atoms in frames], dtype=np.float64) if known else None,
    )


def _cells(frames: Sequence[Atoms]) -> Array | None:
    """Cells [T, 3, 3] with zeros along free directions; None for molecules."""
    if not frames[0].pbc.any() or any((atoms.pbc != frames[0].pbc).any() for atoms in frames):
        return None
    return np.array([np.where(atoms.pbc[:, None], atoms.cell[:], 0.0) for atoms in frames])


def _read_trace(path: Path) -> Trajectory:
    try:
        with path.open("rb") as file, np.load(file) as trace:
            steps = trace["step"]
            found = Trajectory(
                trace["numbers"],
                trace["positions"].astype(np.float64),
                trace["cell"] if trace["cell"].any() else None,
                float(trace["timestep"]) * float(steps[0]) / 1000.0,
                trace["max_u"],
            )
    except (OSError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError, BadZipFile):
        raise DataError(f"{path} is not a trace of a replica (md.trace_every), or it is damaged.") from None
    _check_spacing(path, steps.tolist())
    return found


def _check_spacing(path: Path, steps: Sequence[int]) -> None:
    if len(set(np.diff(steps).tolist())) > 1:
        raise DataError(f"The frames of {path} are not equally spaced: autocorrelations need a fixed --spacing.")


def read_traces(run: Path) -> Iterator[Trajectory]:
    """Traces of all finished iterations of a run (``md.trace_every``), in order, one at a time: they may be large."""
    folder = RunFolder(run)
    for entry in read_iterations(folder):
        for path in sorted(folder.iteration(entry.iteration).glob("trace_*.npz")):
            yield _read_trace(path)


@dataclass(frozen=True)
class Times:
    """Autocorrelation times of trajectories."""

    positions: float
    """ps, mean over atoms and components; NaN without a long enough trajectory"""
    uncertainty: float
    """of max_i u_i, ps; NaN if it is not known"""
    trajectories: int
    """long enough to count"""
    duration: float
    """of these together, ps"""
    longest: float
    """of these, ps"""
    spacing: float
    """between records, ps"""


def correlation_times(trajectories: Iterable[Trajectory], shortest: float = SHORTEST) -> Times:
    """Autocorrelation times of all trajectories (of one system and one spacing) of at least ``shortest`` ps."""
    positions, uncertainty = EffectiveSamples(), EffectiveSamples()
    durations: list[float] = []
    spacings: set[float] = set()
    for trajectory in trajectories:
        if len(trajectory) < 2 or trajectory.duration < shortest:
            continue
        spacings.add(round(trajectory.spacing, 9))
        if len(spacings) > 1:
            raise DataError("Trajectories with different spacings (--spacing) have no common autocorrelation time.")
        durations.append(trajectory.duration)
        positions.add(trajectory.internal_positions())
        if trajectory.max_u is not None:
            uncertainty.add(trajectory.max_u)
    spacing = spacings.pop() if spacings else float("nan")
    longest = max(durations, default=0.0)
    return Times(positions.time(spacing), uncertainty.time(spacing), len(durations), sum(durations), longest, spacing)
