"""One piece of a trajectory that watches its own error: LAMMPS in a worker process, a state in and a state out.

Between checks LAMMPS runs alone; at each check the largest atomic uncertainty of fix ubmd goes to a trigger
(`ubmd.lammps.triggers`). The piece ends where the trigger asks for a label, at its step limit, where an atom leaves
the range of a force-constant potential (guard), or when it makes no sense any more. The state that comes back is that
of the last check that made sense, in full precision: the next piece goes on from there, with the same or another model.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from ctypes import c_double
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms, units
from ase.calculators.lammps import Prism
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ubmd.aliases import Aliases
from ubmd.attempts import Attempt, end_attempts
from ubmd.data.state import state_arrays
from ubmd.errors import ModelError, SimulationError
from ubmd.files import replacing
from ubmd.lammps.session import (
    Neighbours,
    ThinBoxError,
    error_message,
    place_atoms,
    raise_if_box_is_thin,
    start_lammps,
    symbols_of,
    system_commands,
)
from ubmd.lammps.triggers import Trigger, load_trigger

Array = NDArray[np.float64]
FIX = "monitor"
_GUARD = re.compile(r"atom (\d+) is (\S+) A away from its site, more than the (\S+) A")  # the plugin's error
_LOOK = 50  # checks between looks at the temperature and notes of the progress
_SPEED = 1000.0 * units.fs  # Å/ps in ASE's unit of speed


@dataclass(frozen=True)
class TrajectoryState:
    """Where a trajectory is. Positions are unwrapped."""

    numbers: NDArray[np.int64]
    """[n]"""
    cell: Array
    """[3, 3], rows, Å"""
    pbc: bool
    positions: Array
    """[n, 3], Å"""
    velocities: Array
    """[n, 3], Å/ps"""
    step: int
    trigger: dict[str, Any]
    """state of its trigger"""
    masses: Array | None = None
    """[n], amu; None: the usual ones"""

    @classmethod
    def begin(cls, atoms: Atoms, temperature: float, trigger: Trigger, rng: np.random.Generator) -> TrajectoryState:
        """At the positions of a structure, with Maxwell-Boltzmann velocities (K) and the centre of mass at rest."""
        masses = atoms.get_masses()
        widths = np.sqrt(units.kB * temperature / masses) * _SPEED
        velocities = widths[:, None] * rng.standard_normal((len(atoms), 3))
        velocities -= masses @ velocities / masses.sum()
        pbc = bool(atoms.pbc.all())
        numbers = np.asarray(atoms.numbers, dtype=np.int64)
        state = cls(numbers, np.array(atoms.cell), pbc, atoms.positions.copy(), velocities, 0, trigger.state())
        return replace(state, masses=state_arrays(atoms).get("masses"))

    def atoms(self) -> Atoms:
        """The structure with its masses, without velocities."""
        return Atoms(self.numbers, self.positions, cell=self.cell, pbc=self.pbc, masses=self.masses)

    def arrays(self) -> dict[str, Any]:
        """For an npz file."""
        fields = {name: getattr(self, name) for name in ("numbers", "cell", "pbc", "positions", "velocities", "step")}
        own = {} if self.masses is None else {"masses": self.masses}
        return fields | own | {"trigger": json.dumps(self.trigger)}

    @classmethod
    def from_arrays(cls, data: Any) -> TrajectoryState:
        """What `arrays` gave, after a round trip through a file."""
        arrays = {name: data[name] for name in ("numbers", "cell", "positions", "velocities")}
        masses = data.get("masses")
        trigger = json.loads(str(data["trigger"]))
        return cls(**arrays, pbc=bool(data["pbc"]), step=int(data["step"]), trigger=trigger, masses=masses)


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


class PieceTask(BaseModel):
    """Everything that decides a piece: the same task repeats it bit for bit on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: int
    model: Path
    start: Path
    """state (npz)"""
    result: Path
    """npz that is written"""
    steps: int
    """most steps; a multiple of check_every"""
    timestep: float
    """fs"""
    temperature: float
    """K"""
    damping: float
    """damping time of the thermostat, ps"""
    check_every: int
    """steps"""
    frames: int
    """most frames that are kept, evenly spaced"""
    precision: Literal["mixed", "single", "double"]
    force: float
    """bias strength tau; 0: none"""
    species: dict[str, float]
    window: int
    """checks in the window of the bias scale"""
    noise: float
    """of the model's labels, eV/Å: for the trigger's floor"""
    lattice: bool
    """whether the model is one of a crystal (fix ubmd then gives the largest displacement)"""
    langevin_seed: int


class PieceResult(BaseModel):
    """How a piece ended; the rest is in its npz file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: int
    temperature: float
    begin: int
    """step of the trajectory"""
    end: int
    ended: Literal["asked", "segment", "guard", "failed"]
    reason: str
    """one sentence for guard and failed, else empty"""
    rule: str
    """of the trigger that asked; 'guard'; else empty"""
    error: float | None
    """at the last check, eV/Å"""
    threshold: float | None
    """that was passed, eV/Å; None if the trigger did not ask"""
    max_error: float | None
    """of all checks, eV/Å; None without a check"""
    mean_error: float | None
    max_displacement: float
    """largest |u| of all checks, Å; 0 for models without a lattice"""
    bias_share: float
    """|F_bias| / |F| at the last check"""
    ms_per_step: float


@dataclass
class PieceData:
    """What a piece leaves behind besides its state."""

    steps: NDArray[np.int64]
    """[N] step of the trajectory at each check"""
    errors: Array
    """[N] eV/Å"""
    thresholds: Array
    """[N] eV/Å"""
    means: Array
    """[N] eV/Å; NaN without"""
    frames: Array
    """[K, n, 3] unwrapped positions of frames that were not asked about, Å"""
    frame_steps: NDArray[np.int64]
    """[K]"""


def read_piece(path: Path) -> tuple[TrajectoryState, PieceData]:
    """(state at the end, what happened) of a finished piece; errors as for `read_state`."""
    state = read_state(path)
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as data:
        return state, PieceData(**{name: data[name] for name in PieceData.__dataclass_fields__})


def run_piece(task: PieceTask, note: Callable[[Attempt, PieceResult], None] | None = None) -> PieceResult:
    """Run a piece to its end and write its file.

    Failures of the dynamics are part of the result.

    Args:
        task: what to run.
        note: called when the file is in its place and the attempt is not yet over, as for replicas.

    Raises:
        TakenOver: another process has begun the same piece; nothing of what that one writes is touched.
        SimulationError: it could not be started (no LAMMPS, no plugin, no model, unknown element).
        ModelError: the state cannot be read.
    """
    state = read_state(task.start)
    attempt = Attempt.begin(task.result)
    try:
        piece, ended, reason, seconds = _run_here(task, attempt, state)
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


def _run_here(task: PieceTask, attempt: Attempt, state: TrajectoryState) -> _Ran:
    try:
        return _run_once(task, attempt, state, "bin")
    except ThinBoxError:  # of a flat or linear molecule: as for replicas
        return _run_once(task, attempt, state, "nsq")


def _run_once(task: PieceTask, attempt: Attempt, state: TrajectoryState, neighbours: Neighbours) -> _Ran:
    """`_run_here` with one way to find neighbours; ThinBoxError if it is the wrong one."""
    piece = _Piece(task, state)
    engine = _Engine(task, state, neighbours)
    try:
        begin = time.monotonic()
        ended, reason = piece.run(engine, attempt)
        return piece, ended, reason, time.monotonic() - begin
    finally:
        engine.close()


def write_piece_without_steps(task: PieceTask, reason: str, ended: _Ending) -> PieceResult:
    """The result of a piece whose process was lost: nothing has happened. After 'segment' the trajectory goes on.

    Attempts at it are over, also if their processes live on.
    """
    end_attempts(task.result)
    piece = _Piece(task, read_state(task.start))
    _write_piece(task.result, piece)
    return piece.result(ended, reason, 0.0)


def _write_piece(path: Path, piece: _Piece) -> None:
    _write(path, piece.state().arrays() | vars(piece.data()))


_Ending = Literal["asked", "segment", "guard", "failed"]


class _Piece:
    """A piece in the making: what its checks have seen."""

    def __init__(self, task: PieceTask, state: TrajectoryState) -> None:
        self.task = task
        self.begin = state.step
        self._start = state
        self._sane = state.step, state.positions, state.velocities  # at the last check that made sense
        self.trigger = load_trigger(state.trigger)
        self.bias_share = self.max_displacement = 0.0
        self._rule = ""
        self._threshold: float | None = None
        self._series: list[tuple[int, float, float, float]] = []
        self._frames = _Frames(task.frames)

    def run(self, engine: _Engine, attempt: Attempt) -> tuple[_Ending, str]:
        """(how it ended, reason if it went wrong)."""
        for check in range(self.task.steps // self.task.check_every):
            try:
                engine.run(self.task.check_every, first=check == 0)
            except Exception as error:  # the only type that the LAMMPS module raises
                raise_if_box_is_thin(error)
                return self._stopped_by(error_message(error))
            ending = self._check(engine, check)
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

    def _check(self, engine: _Engine, check: int) -> tuple[_Ending, str] | None:
        """Look at one step; how the piece ends with it, or None."""
        error, step = engine.error(), self.begin + (check + 1) * self.task.check_every
        positions, velocities = engine.positions(), engine.velocities()
        if not (math.isfinite(error) and np.isfinite(positions).all() and np.isfinite(velocities).all()):
            return "failed", f"Positions or the error are not finite at step {step}."
        if check % _LOOK == 0:
            limit = 10.0 * self.task.temperature + 5000.0
            if not (temperature := engine.temperature()) < limit:
                return "failed", f"The temperature is {temperature:.0f} K at step {step}: it exploded."
        threshold, mean = self.trigger.threshold, self.trigger.mean
        call = self.trigger.observe(error, self.task.noise)
        self._series.append((step, error, threshold, mean))
        self.bias_share = engine.bias_share()
        self.max_displacement = max(self.max_displacement, engine.displacement())
        self._sane = step, positions, velocities
        if call is None:
            self._frames.add(step, positions)
            return None
        self._rule, self._threshold = call.rule, call.threshold
        return "asked", ""

    def state(self) -> TrajectoryState:
        """At the last check that made sense."""
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
    """Evenly spaced frames of a piece of unknown length: every second one goes whenever there are too many."""

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


class _Engine:
    """A LAMMPS instance with a trajectory's system, thermostat and monitor; one process."""

    def __init__(self, task: PieceTask, state: TrajectoryState, neighbours: Neighbours) -> None:
        self._task = task
        atoms = state.atoms()
        # LAMMPS turns cells; states and frames stay in the structure's own orientation.
        self._cell = state.cell if state.pbc else np.zeros((3, 3))
        self._rotation = Prism(state.cell).rot_mat if state.pbc else np.eye(3)
        self._aliases = Aliases()
        model = self._aliases.of(task.model)
        self._lammps = start_lammps(Path("none"))
        try:
            for command in system_commands(atoms, model, task.precision, neighbours):
                self._lammps.command(command)
            place_atoms(self._lammps, atoms)
            self._shift = np.zeros_like(state.positions)
            self._shift = state.positions - self.positions()
            self._set_velocities(state.velocities)
            for command in self._dynamics(symbols_of(atoms)):
                self._lammps.command(command)
        except Exception as error:
            reason = self._aliases.real(error_message(error))
            self.close()
            raise SimulationError(f"LAMMPS could not be set up: {reason}") from error

    def _dynamics(self, symbols: list[str]) -> Iterator[str]:
        task, temperature = self._task, f"{self._task.temperature:.17g}"
        yield f"timestep {task.timestep / 1000.0:.17g}"
        # Nothing that makes LAMMPS compute a pressure: it would cost the virial at every check.
        yield "thermo_style custom step"
        yield "thermo_modify lost error"
        yield "fix integrate all nve"
        # Without a net random force the crystal does not drift away from its sites.
        langevin = f"{temperature} {temperature} {task.damping:.17g} {task.langevin_seed}"
        yield f"fix thermostat all langevin {langevin} zero yes"
        strengths = [f"{s} {x:.17g}" for s, x in task.species.items() if s in symbols]
        bias = f"force {task.force:.17g} window {task.window} " if task.force > 0.0 else ""
        species = f"species {' '.join(strengths)} " if strengths and bias else ""
        yield f"fix {FIX} all ubmd {bias}{species}every {task.check_every}"

    def run(self, steps: int, first: bool) -> None:
        """Run on; later parts continue without a new setup, so that parts leave no trace in the trajectory."""
        self._lammps.command(f"run {steps} post no" if first else f"run {steps} pre no post no")

    def error(self) -> float:
        """Largest atomic uncertainty, eV/Å."""
        return self._vector(1)

    def bias_share(self) -> float:
        """|F_bias| / |F|."""
        return self._vector(5)

    def displacement(self) -> float:
        """Largest distance of an atom from its site, Å."""
        return self._vector(9) if self._task.lattice else 0.0

    def temperature(self) -> float:
        """Kinetic temperature, K."""
        return float(self._lammps.extract_compute("thermo_temp", 0, 0))

    def positions(self) -> Array:
        """Unwrapped positions [n, 3] in the structure's orientation, Å."""
        images = self._gather("image", 0) @ self._cell
        return self._gather("x", 1) @ self._rotation.T + images + self._shift

    def velocities(self) -> Array:
        """Velocities [n, 3] in the structure's orientation, Å/ps."""
        return self._gather("v", 1) @ self._rotation.T

    def close(self) -> None:
        """Free the instance and its files."""
        self._lammps.close()
        self._aliases.close()

    def _set_velocities(self, velocities: Array) -> None:
        flat = (velocities @ self._rotation).ravel()
        self._lammps.scatter_atoms("v", 1, 3, (c_double * len(flat))(*flat))

    def _gather(self, name: str, kind: int) -> Array:
        return np.array(self._lammps.gather_atoms(name, kind, 3), dtype=np.float64).reshape(-1, 3)

    def _vector(self, index: int) -> float:
        return float(self._lammps.extract_fix(FIX, 0, 1, index))


def _write(path: Path, arrays: dict[str, Any]) -> None:
    """An npz file; the same arrays always give the same bytes."""
    with replacing(path) as handle:
        np.savez(handle, **arrays)
