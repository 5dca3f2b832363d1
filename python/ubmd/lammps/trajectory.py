"""One segment of a trajectory that monitors its own error: LAMMPS in a worker process, a state in and a state out.

Between checks LAMMPS runs alone; at each check the largest atomic uncertainty of fix ubmd goes to a trigger
(`ubmd.lammps.triggers`). The segment ends where the trigger requests a label, at its step limit, where an atom exceeds
the displacement limit of a force-constant potential (guard), or when its state is invalid. The state that comes back is
that of the last valid check, in full precision: the next segment continues from there, with the same or another model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from numpy.typing import NDArray

from ubmd.attempts import Attempt, end_attempts
from ubmd.data.constraints import FIXED, is_fixed
from ubmd.data.labelled_range import LabelledRange
from ubmd.data.state import state_arrays
from ubmd.errors import ModelError, SimulationError
from ubmd.files import replacing
from ubmd.lammps.box import Box
from ubmd.lammps.engine import ALONE, Company, MDEngine, PieceResult, PieceTask
from ubmd.lammps.session import (
    FixValue,
    Neighbours,
    Session,
    highest_temperature,
    mobile_group,
    species_words,
    symbols_of,
    with_suitable_neighbours,
)
from ubmd.lammps.triggers import Trigger, load_trigger

Array = NDArray[np.float64]
FIX = "monitor"
_GUARD = re.compile(  # the plugin's error (crystal_sites.cpp)
    r"atom (\d+) is (\S+) A away from its site, more than the displacement limit of the force-constant model, (\S+) A"
)
_LOOK = 50  # checks between tests of the temperature and notes of the progress
_SPEED = 1000.0 * units.fs  # Å/ps in ASE's unit of speed


@dataclass(frozen=True)
class TrajectoryState:
    """Where a trajectory is. Positions are unwrapped."""

    numbers: NDArray[np.int64]
    """[n]"""
    cell: Array
    """[3, 3], rows, Å"""
    pbc: NDArray[np.bool_]
    """[3]"""
    positions: Array
    """[n, 3], Å"""
    velocities: Array
    """[n, 3], Å/ps"""
    step: int
    trigger: dict[str, Any]
    """state of its trigger"""
    masses: Array | None = None
    """[n], amu; None: the usual ones"""
    fixed: NDArray[np.bool_] | None = None
    """[n], atoms that stay where they are; None: there are none"""

    @classmethod
    def begin(cls, atoms: Atoms, temperature: float, trigger: Trigger, rng: np.random.Generator) -> TrajectoryState:
        """At the positions of a structure, with Maxwell-Boltzmann velocities (K).

        The centre of mass is at rest, unless atoms are fixed: then these are.
        """
        masses, fixed = atoms.get_masses(), is_fixed(atoms)
        widths = np.sqrt(units.kB * temperature / masses) * _SPEED
        velocities = widths[:, None] * rng.standard_normal((len(atoms), 3))
        velocities -= masses @ velocities / masses.sum() if not fixed.any() else fixed[:, None] * velocities
        pbc = np.array(atoms.pbc)
        numbers = np.asarray(atoms.numbers, dtype=np.int64)
        state = cls(numbers, np.array(atoms.cell), pbc, atoms.positions.copy(), velocities, 0, trigger.state())
        return replace(state, masses=state_arrays(atoms).get("masses"), fixed=fixed if fixed.any() else None)

    def atoms(self) -> Atoms:
        """The structure with its masses and its note of fixed atoms, without velocities."""
        atoms = Atoms(self.numbers, self.positions, cell=self.cell, pbc=self.pbc, masses=self.masses)
        if self.fixed is not None:
            atoms.set_array(FIXED, self.fixed)
        return atoms

    def arrays(self) -> dict[str, Any]:
        """For an npz file."""
        fields = {name: getattr(self, name) for name in ("numbers", "cell", "positions", "velocities", "step")}
        # one number as long as it says all, as in files of earlier versions
        pbc = self.pbc if len(set(self.pbc.tolist())) > 1 else bool(self.pbc.all())
        own = {name: value for name in ("masses", "fixed") if (value := getattr(self, name)) is not None}
        return fields | own | {"pbc": pbc, "trigger": json.dumps(self.trigger)}

    @classmethod
    def from_arrays(cls, data: Any) -> TrajectoryState:
        """What `arrays` gave, after a round trip through a file."""
        arrays = {name: data[name] for name in ("numbers", "cell", "positions", "velocities")}
        own = {name: data.get(name) for name in ("masses", "fixed")}
        pbc = np.array(np.broadcast_to(data["pbc"], 3), dtype=bool)
        return cls(**arrays, pbc=pbc, step=int(data["step"]), trigger=json.loads(str(data["trigger"])), **own)


def write_state(path: Path, state: TrajectoryState) -> None:
    """Write a state to an npz file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, state.arrays())


def read_state(path: Path) -> TrajectoryState:
    """The state in an npz file of `write_state` or `run_piece`.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
            return TrajectoryState.from_arrays(data)
    except Exception as error:
        raise ModelError(f"The state of the trajectory in {path} cannot be read ({error}).") from error


@dataclass
class PieceData:
    """What a segment leaves behind besides its state."""

    steps: NDArray[np.int64]
    """[N] step of the trajectory at each check"""
    errors: Array
    """[N] eV/Å"""
    thresholds: Array
    """[N] eV/Å"""
    means: Array
    """[N] eV/Å; NaN without"""
    frames: Array
    """[K, n, 3] unwrapped positions of frames without a request, Å"""
    frame_steps: NDArray[np.int64]
    """[K]"""


def read_piece(path: Path) -> tuple[TrajectoryState, PieceData]:
    """(state at the end, what happened) of a finished segment; errors as for `read_state`."""
    state = read_state(path)
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
        return state, PieceData(**{name: data[name] for name in PieceData.__dataclass_fields__})


def run_piece(
    task: PieceTask,
    note: Callable[[Attempt, PieceResult], None] | None = None,
    company: Company = ALONE,
) -> PieceResult:
    """Run a segment to its end and write its file; see `ubmd.lammps.engine.MDEngine.run`.

    Raises:
        TakenOver: another process has begun the same segment.
        SimulationError: it could not be started (no LAMMPS, no plugin, no model, unknown element).
        ModelError: the state cannot be read.
    """
    state = read_state(task.start)
    attempt = Attempt.begin(task.result)
    try:
        piece, ended, reason, seconds = with_suitable_neighbours(partial(_run_once, task, attempt, state, company))
        _write_piece(attempt.folder / task.result.name, piece)
        attempt.put(task.result.name, task.result)
        result = piece.result(ended, reason, seconds)
        if note is not None:
            note(attempt, result)
    except OSError:
        attempt.check()  # without the folder it cannot write
        raise
    finally:
        attempt.end()
    end_attempts(task.result)
    return result


_Ran = tuple["_Piece", "_Ending", str, float]
"""(piece, how it ended, reason if it went wrong, wall time in s)"""


def _run_once(
    task: PieceTask,
    attempt: Attempt,
    state: TrajectoryState,
    company: Company,
    neighbours: Neighbours,
) -> _Ran:
    """Run a segment with one way to find neighbours; ThinBoxError if it is the wrong one."""
    piece = _Piece(task, state)
    with _session(task, state, neighbours, company) as (session, oriented):
        begin = company.seconds()
        ended, reason = piece.run(session, oriented, attempt)
        return piece, ended, reason, company.seconds() - begin


def salvage(task: PieceTask, reason: str) -> PieceResult:
    """The result of a segment whose process was lost: nothing has happened, its file has the state of the start.

    Attempts at it are over, also if their processes live on.
    """
    end_attempts(task.result)
    piece = _Piece(task, read_state(task.start))
    _write_piece(task.result, piece)
    return piece.result("failed", reason, 0.0)


def _write_piece(path: Path, piece: _Piece) -> None:
    _write(path, piece.state().arrays() | vars(piece.data()))


_Ending = Literal["asked", "segment", "guard", "failed"]


class _Piece:
    """A running segment: the results of its checks."""

    def __init__(self, task: PieceTask, state: TrajectoryState) -> None:
        self.task = task
        self.begin = state.step
        self._start = state
        self._sane = state.step, state.positions, state.velocities  # at the last valid check
        self.trigger = load_trigger(state.trigger)
        self._range = None if task.labelled_range is None else LabelledRange.load(task.labelled_range)
        self.bias_share = self.max_displacement = 0.0
        self._rule = ""
        self._threshold: float | None = None
        self._series: list[tuple[int, float, float, float]] = []
        self._frames = _Frames(task.frames)

    def run(self, session: Session, oriented: _Oriented, attempt: Attempt) -> tuple[_Ending, str]:
        """(how it ended, reason if it went wrong)."""
        for check in range(self.task.steps // self.task.check_every):
            try:
                session.run(self.task.check_every, first=check == 0)
            except SimulationError as error:
                return self._stopped_by(str(error))
            ending = self._check(session, oriented, check)
            if ending is not None:
                return ending
            if check % _LOOK == 0:
                attempt.report(self._sane[0] - self.begin)
        return "segment", ""

    def _stopped_by(self, message: str) -> tuple[_Ending, str]:
        if self.task.lattice and (found := _GUARD.search(message)):
            self._rule = "guard"
            atom, distance, limit = found.groups()
            return "guard", f"Atom {atom} is {distance} Å away from its site, more than {limit} Å (max_displacement)."
        return "failed", f"LAMMPS stopped with an error: {message}"

    def _check(self, session: Session, oriented: _Oriented, check: int) -> tuple[_Ending, str] | None:
        """Check one step; how the segment ends with it, or None."""
        error = session.fix_value(FIX, FixValue.MAX_UNCERTAINTY)
        step = self.begin + (check + 1) * self.task.check_every
        positions, velocities = oriented.positions(), oriented.velocities()
        if not (math.isfinite(error) and np.isfinite(positions).all() and np.isfinite(velocities).all()):
            return "failed", f"Positions or the error are not finite at step {step}."
        if check % _LOOK == 0:
            limit = highest_temperature(self.task.temperature)
            if not (temperature := session.temperature()) < limit:
                return "failed", f"The temperature is {temperature:.0f} K at step {step}: it exploded."
        threshold, mean = self.trigger.threshold, self.trigger.mean
        reach = 0.0 if self._range is None else self._range.reach(positions)
        call = self.trigger.observe(error, self.task.noise, reach)
        self._series.append((step, error, threshold, mean))
        self.bias_share = session.fix_value(FIX, FixValue.BIAS_SHARE)
        if self.task.lattice:
            self.max_displacement = max(self.max_displacement, session.fix_value(FIX, FixValue.DISPLACEMENT))
        self._sane = step, positions, velocities
        if call is None:
            self._frames.add(step, positions)
            return None
        self._rule, self._threshold = call.rule, call.threshold
        return "asked", ""

    def state(self) -> TrajectoryState:
        """At the last valid check."""
        step, positions, velocities = self._sane
        return replace(self._start, positions=positions, velocities=velocities, step=step, trigger=self.trigger.state())

    def data(self) -> PieceData:
        """Series and frames."""
        series = np.array(self._series, dtype=np.float64).reshape(-1, 4)
        frames, steps = self._frames.chosen(len(self._start.numbers))
        checks, errors, thresholds, means = series.T
        return PieceData(checks.astype(np.int64), errors, thresholds, means, frames, steps)

    def result(self, ended: _Ending, reason: str, seconds: float) -> PieceResult:
        """The summary."""
        errors = [error for _, error, _, _ in self._series]
        return PieceResult(
            replica=self.task.replica,
            temperature=self.task.temperature,
            begin=self.begin,
            end=self._sane[0],
            ended=ended,
            reason=reason,
            rule=self._rule,
            error=errors[-1] if errors else None,
            threshold=self._threshold,
            max_error=max(errors, default=None),
            mean_error=math.fsum(errors) / len(errors) if errors else None,
            max_displacement=self.max_displacement,
            bias_share=self.bias_share,
            ms_per_step=round(1000.0 * seconds / max(self._sane[0] - self.begin, 1), 4),
        )


class _Frames:
    """Evenly spaced frames of a segment of unknown length: every second one is dropped whenever there are too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._stride = 1
        self._seen = 0
        self._kept: list[tuple[int, Array]] = []

    def add(self, step: int, positions: Array) -> None:
        """Offer the next frame."""
        self._seen += 1
        if self._seen % self._stride == 0:
            self._kept.append((step, positions))
        if len(self._kept) == 2 * self._most:
            self._kept, self._stride = self._kept[1::2], 2 * self._stride

    def chosen(self, n: int) -> tuple[Array, NDArray[np.int64]]:
        """At most `most` of them: positions [K, n, 3] and steps [K], the last ones of equal shares."""
        count = min(self._most, len(self._kept))
        picks = [self._kept[(k + 1) * len(self._kept) // count - 1] for k in range(count)]
        steps = np.array([step for step, _ in picks], dtype=np.int64)
        return np.array([positions for _, positions in picks]).reshape(-1, n, 3), steps


@contextmanager
def _session(
    task: PieceTask, state: TrajectoryState, neighbours: Neighbours, company: Company
) -> Iterator[tuple[Session, _Oriented]]:
    """LAMMPS with a trajectory's system, thermostat and monitor; one process."""
    atoms = state.atoms()
    with Session(model=task.model, company=company) as session:
        with session.setting_up():
            session.make_system(atoms, task.precision, neighbours, task.device)
            oriented = _Oriented(session, state)
            session.commands(_dynamics_commands(task, atoms))
        yield session, oriented


def _dynamics_commands(task: PieceTask, atoms: Atoms) -> Iterator[str]:
    """Integration at constant temperature, and the uncertainty fix; fixed atoms have neither."""
    temperature, group = f"{task.temperature:.17g}", mobile_group(atoms)
    yield f"timestep {task.timestep / 1000.0:.17g}"
    # Nothing that makes LAMMPS compute a pressure: it would cost the virial at every check.
    yield "thermo_style custom step"
    yield "thermo_modify lost error"
    yield f"fix integrate {group} nve"
    # Without a net random force the crystal does not drift away from its sites; fixed atoms hold it anyway.
    langevin = f"{temperature} {temperature} {task.damping:.17g} {task.langevin_seed}"
    yield f"fix thermostat {group} langevin {langevin} zero {'yes' if group == 'all' else 'no'}"
    bias = f"force {task.force:.17g} window {task.window} " if task.force > 0.0 else ""
    species = species_words(task.species, symbols_of(atoms)) if bias else ""
    yield f"fix {FIX} {group} ubmd {bias}{species}every {task.check_every}"


class _Oriented:
    """A trajectory's atoms in their own orientation, as states and frames have them; LAMMPS rotates cells."""

    def __init__(self, session: Session, state: TrajectoryState) -> None:
        """Give the atoms of a session the velocities of a state."""
        self._session = session
        box = Box(state.atoms())
        self._cell, self._rotation = box.own_cell(), box.rotation
        self._shift = np.zeros_like(state.positions)
        self._shift = state.positions - self.positions()
        session.scatter("v", state.velocities @ self._rotation)

    def positions(self) -> Array:
        """Unwrapped positions [n, 3], Å."""
        images = self._session.images() @ self._cell
        return self._session.positions() @ self._rotation.T + images + self._shift

    def velocities(self) -> Array:
        """Velocities [n, 3], Å/ps."""
        return self._session.velocities() @ self._rotation.T


def _write(path: Path, arrays: dict[str, Any]) -> None:
    """An npz file; the same arrays always give the same bytes."""
    with replacing(path) as handle:
        np.savez(handle, **arrays)


class _Pieces:
    """Segments of trajectories in LAMMPS."""

    result_type = PieceResult
    run = staticmethod(run_piece)
    salvage = staticmethod(salvage)

    @staticmethod
    def output(task: PieceTask) -> Path:
        """State, series and frames."""
        return task.result


PIECES: MDEngine[PieceTask, PieceResult] = _Pieces()
"""LAMMPS as the engine of segments"""
