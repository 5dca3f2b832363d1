"""One replica: LAMMPS through its Python interface, in a worker process, files in and files out.

The fix writes frames to a folder of this attempt alone (`ubmd.attempts`) while the run goes on; frames, log and trace
have their own names once it has ended. Between pieces of the run the replica is checked for nonsense (NaN, absurd
temperature, overlapping atoms, a cell out of bounds). However it ends - threshold, step limit, LAMMPS error, crash of
the whole process (`salvage`) - the frames up to the last sane one are kept.

LAMMPS turns cells (first vector along x, second in the xy plane), and so do the frames of cells: positions, cell and
whatever is computed from them later belong together, in the turned orientation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from ubmd.aliases import Aliases
from ubmd.attempts import Attempt, end_attempts
from ubmd.data.extxyz import as_extxyz
from ubmd.data.geometry import check_geometry
from ubmd.data.state import take_state
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError, MachineError, SimulationError, UbmdError
from ubmd.faults import killed_by, killed_rank
from ubmd.lammps.frames import count_frames, read_frames
from ubmd.lammps.plugin import check_shared_memory
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

FIX = "bias"
_FRAMES = "frames.extxyz"  # in the folder of an attempt: as the fix writes them
_LOG = "log.lammps"
_TRACE = "trace.npz"
_GIVEN, _ENDED = "task.json", "ended.json"  # for the MPI ranks, and from them
_LOOK = 1.0  # s between two looks whether MPI ranks are still wanted
_PATIENCE = 10.0  # s for mpiexec to end its ranks
_PIECE = 500  # steps between checks; short enough to lose little, long enough to cost nothing
_BAR_PER_MPA = 10.0


class ReplicaTask(BaseModel):
    """Everything that decides a replica's trajectory: the same task repeats it bit for bit on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    replica: int
    model: Path
    start: Path
    """extxyz; the first structure is the start."""
    frames: Path
    """extxyz that is written."""
    steps: int
    timestep: float
    """fs"""
    temperature: float
    """K"""
    damping: float
    """damping time of the thermostat, ps"""
    ensemble: Literal["nvt", "npt"] = "nvt"
    pressure: float = 0.0
    """of the barostat (npt), MPa"""
    pressure_damping: float = 1.0
    """damping time of the barostat (npt), ps"""
    coupling: Literal["iso", "aniso", "tri"] = "tri"
    """what the barostat moves (npt)"""
    cell_limit: float = 2.5
    """largest factor by which volume and lengths may grow or shrink (npt)"""
    frames_every: int
    precision: Literal["mixed", "single", "double"]
    force: float
    """bias strength tau; with stress 0, too: a monitor only"""
    stress: float = 0.0
    """bias strength tau_S of the stress (npt)"""
    uncertainty: Literal["energy", "atomic"] = "energy"
    """what the bias raises"""
    species: dict[str, float]
    window: int
    every: int
    threshold: float
    """the run stops when max_i u_i passes this, eV/Å; inf: never"""
    velocity_seed: int
    langevin_seed: int
    min_distance: float
    """share of the covalent radii; closer atoms end the replica"""
    ranks: int = 1
    """MPI processes that share the replica's atoms"""
    trace_every: int | None = None
    """steps between records of the trace, a multiple of ``every``; None: no trace"""
    colvars: str = ""
    """configuration of a fix colvars that joins the dynamics; empty: none"""


class ReplicaResult(BaseModel):
    """How a replica ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: int
    steps: int
    """MD steps run (sane ones)"""
    stopped: Literal["threshold", "step limit", "failed"]
    reason: str
    """one sentence if it failed, else empty"""
    frames: int
    """frames in the file"""
    max_u: float
    """largest max_i u_i of the frames, eV/Å"""
    bias_share: float
    """|F_bias| / |F| at the end (0 without bias)"""
    seconds: float
    """wall time of the dynamics"""
    ms_per_step: float
    ensemble: Literal["nvt", "npt"] = "nvt"
    temperature: float | None = None
    """of the thermostat, K"""
    pressure: float | None = None
    """of the barostat, MPa (npt)"""
    force: float | None = None
    """bias strength tau"""
    stress: float | None = None
    """bias strength tau_S"""


def run_replica(task: ReplicaTask, note: Callable[[Attempt, ReplicaResult], None] | None = None) -> ReplicaResult:
    """Run a replica to its end and write its frames.

    Failures of the dynamics are part of the result.

    Args:
        task: what to run.
        note: called when the frames are in their place and the attempt is not yet over; others must not hear of its
            end before what this writes (through the attempt) is there.

    Raises:
        MachineError: a process of it was killed from outside, or MPI has no room in /dev/shm.
        TakenOver: another process has begun the same replica; nothing of what that one writes is touched.
        SimulationError: the run could not be started (no LAMMPS, no plugin, no model, unknown element).
    """
    attempt = Attempt.begin(task.frames)
    _remove_old_leftovers(task)
    try:
        if task.ranks > 1:
            ended = _run_under_mpi(task, attempt)
        else:
            _, ended = _run_here(task, attempt)
        result = _finish(task, attempt, *ended)
    except (UbmdError, OSError) as error:
        attempt.check()  # without the folder all sorts of things fail
        if isinstance(error, UbmdError):  # there is nothing to salvage
            _keep_log(task, attempt)
            attempt.end()
        raise
    if note is not None:
        note(attempt, result)
    end_attempts(task.frames)
    return result


_Ended = tuple[Literal["threshold", "step limit", "failed"], str, int, float, float]
"""(how, reason if it failed, steps, |F_bias| / |F|, wall time in s)"""


def _run_here(task: ReplicaTask, attempt: Attempt) -> tuple[int, _Ended]:
    """(MPI rank of this process, how the replica ended); all ranks of a replica call this."""
    try:
        return _run_once(task, attempt, "bin")
    except ThinBoxError:  # all pairs need no box; bins come first, as their order decides last digits
        return _run_once(task, attempt, "nsq")


def _run_once(task: ReplicaTask, attempt: Attempt, neighbours: Neighbours) -> tuple[int, _Ended]:
    """`_run_here` with one way to find neighbours; ThinBoxError if it is the wrong one."""
    atoms = read_structures(task.start)[0]
    engine = _Engine(task, attempt.folder, atoms, neighbours)
    trace = _Trace(task, atoms)
    try:
        begin = time.monotonic()
        stopped, reason = _advance(engine, task, attempt, atoms, trace)
        seconds = time.monotonic() - begin
        if engine.rank == 0:
            trace.write(attempt)
        return engine.rank, (stopped, reason, engine.step(), engine.bias_share(), seconds)
    finally:
        engine.close()


def _run_under_mpi(task: ReplicaTask, attempt: Attempt) -> _Ended:
    """Run a replica in processes of its own, which share its atoms; see `main`."""
    check_shared_memory()
    (attempt.folder / _GIVEN).write_text(task.model_dump_json())
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else "mpiexec"
    # -P: a numpy.py of the working directory must not be taken for numpy
    python = [sys.executable, "-P", "-m", "ubmd.lammps.replica"]
    command = [mpiexec, "-n", str(task.ranks), *python, str(attempt.folder)]
    code, said = _wait_for(command, attempt)
    found = attempt.folder / _ENDED
    if code == 0 and found.exists():
        ended: _Ended = tuple(json.loads(found.read_text()))
        return ended
    attempt.check()
    errors = [line for line in said.splitlines() if "Error" in line or "ERROR" in line]
    if (number := killed_rank(said)) and not errors:
        raise MachineError(f"An MPI rank of the replica was {killed_by(number)}.")
    last = errors[-1].strip() if errors else f"mpiexec ended with exit code {code}"
    if not count_frames(attempt.folder / _FRAMES):
        raise SimulationError(f"The replica could not be run on {task.ranks} MPI ranks: {last}")
    return _lost(task, attempt, f"The MPI ranks of the replica failed: {last}")


def _wait_for(command: list[str], attempt: Attempt) -> tuple[int, str]:
    """(exit code, what it said) of a program, which ends when the attempt is over."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as program:
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    said, _ = program.communicate(timeout=_LOOK)
                    return program.returncode, said
                attempt.check()
        except BaseException:
            program.terminate()  # mpiexec takes its ranks along
            with suppress(subprocess.TimeoutExpired):
                program.wait(_PATIENCE)
            program.kill()
            raise


def main(folder: Path) -> None:
    """One MPI rank of a replica: the task from a file in the folder of the attempt, how it ended to another."""
    task = ReplicaTask.model_validate_json((folder / _GIVEN).read_text())
    rank, ended = _run_here(task, Attempt(task.frames, folder))
    if rank == 0:
        (folder / _ENDED).write_text(json.dumps(ended))


def salvage(task: ReplicaTask, reason: str) -> ReplicaResult:
    """The result of a replica whose process was lost: its frames so far, and the reason.

    Of several attempts that one counts which has most frames; all of them are over, also if their processes live on.
    """
    attempt = Attempt.take_over(task.frames, lambda folder: count_frames(folder / _FRAMES))
    result = _finish(task, attempt, *_lost(task, attempt, reason))
    end_attempts(task.frames)
    return result


def _lost(task: ReplicaTask, attempt: Attempt, reason: str) -> _Ended:
    """How a replica ended whose process did not say so."""
    steps = max((int(frame.info["step"]) for frame in _sane_frames(task, attempt.folder)), default=0)
    return "failed", reason, steps, 0.0, 0.0


def _remove_old_leftovers(task: ReplicaTask) -> None:
    """What earlier versions left beside the frames when they were killed."""
    for name in (f"{task.frames.name}.tmp", *(f"{task.frames.stem}.{kind}" for kind in ("progress", "task", "ended"))):
        task.frames.with_name(name).unlink(missing_ok=True)
    shutil.rmtree(task.frames.with_suffix(".colvars"), ignore_errors=True)


def _log_file(task: ReplicaTask) -> Path:
    """LAMMPS's log of a replica that has ended."""
    return task.frames.with_suffix(".log")


def _keep_log(task: ReplicaTask, attempt: Attempt) -> None:
    with suppress(FileNotFoundError):  # LAMMPS did not even start
        attempt.put(_LOG, _log_file(task))


def trace_file(task: ReplicaTask) -> Path:
    """File of the trace of a replica that did not fail: frames_003.extxyz has trace_003.npz."""
    return task.frames.with_name(task.frames.stem.replace("frames", "trace") + ".npz")


class _Trace:
    """Positions, cell and largest uncertainty at a short stride, for autocorrelations; empty without ``trace_every``.

    The file holds ``numbers`` [n], ``timestep`` (fs), and per record ``step`` [T], ``positions`` [T, n, 3] (Å, float32,
    may jump by cell vectors), ``cell`` [T, 3, 3] (Å; zeros for molecules) and ``max_u`` [T] (eV/Å).
    """

    def __init__(self, task: ReplicaTask, atoms: Atoms) -> None:
        self._task = task
        self._atoms = atoms
        self._records: list[tuple[int, np.ndarray, np.ndarray, float]] = []

    def add(self, engine: _Engine) -> None:
        """Record the current step, if it is due; all ranks call this."""
        every, step = self._task.trace_every, engine.step()
        if every and step % every == 0:
            cell = engine.cell() if self._atoms.pbc.all() else np.zeros((3, 3))
            self._records.append((step, engine.positions().astype(np.float32), cell, engine.max_u()))

    def write(self, attempt: Attempt) -> None:
        """To the folder of an attempt, if there is a record."""
        if not self._records:
            return
        steps, positions, cells, max_u = zip(*self._records, strict=True)
        attempt.check()
        np.savez_compressed(
            attempt.folder / _TRACE,
            numbers=self._atoms.numbers,
            timestep=self._task.timestep,
            step=np.array(steps),
            positions=np.array(positions),
            cell=np.array(cells),
            max_u=np.array(max_u),
        )


class _Engine:
    """A LAMMPS instance with one replica's system and fixes, which writes to a folder."""

    def __init__(self, task: ReplicaTask, folder: Path, atoms: Atoms, neighbours: Neighbours = "bin") -> None:
        self._aliases = Aliases()
        task = task.model_copy(update={"model": self._aliases.of(task.model)})
        self._log = self._aliases.of(folder / _LOG)
        folder = self._log.parent
        self._logs = True
        self._lammps = start_lammps(self._log)
        self.rank = int(self._lammps.extract_setting("world_rank"))
        try:
            for command in _system_commands(atoms, task, neighbours):
                self._lammps.command(command)
            place_atoms(self._lammps, atoms)
            if task.colvars and self.rank == 0:
                (folder / "colvars").write_text(task.colvars)
            for command in _dynamics_commands(task, folder, symbols_of(atoms)):
                self._lammps.command(command)
        except Exception as error:
            reason = self.reason(error)
            self.close()
            raise SimulationError(f"LAMMPS could not be set up: {reason}") from error

    def run(self, steps: int, first: bool, logged: bool = True) -> None:
        """Run a piece; later pieces continue without a new setup, so that pieces leave no trace in the trajectory.

        ``logged``: whether it has its lines in LAMMPS's log (those of short pieces would fill the disk).
        """
        if logged != self._logs:
            self._lammps.command(f'log "{self._log}" append' if logged else "log none")
            self._logs = logged
        self._lammps.command(f"run {steps} post no" if first else f"run {steps} pre no post no")

    def step(self) -> int:
        """The current step (the last known one after an error)."""
        return int(self._lammps.extract_global("ntimestep"))

    def stopped(self) -> bool:
        """Whether the fix ended the run because max_i u_i passed the threshold."""
        return self._vector(6) > 0.5

    def bias_share(self) -> float:
        """|F_bias| / |F| at the last step."""
        return float(self._vector(5))

    def max_u(self) -> float:
        """max_i u_i of the last evaluation, eV/Å."""
        return self._vector(1)

    def temperature(self) -> float:
        """Kinetic temperature, K."""
        return float(self._lammps.extract_compute("thermo_temp", 0, 0))

    def positions(self) -> np.ndarray:
        """Positions [n, 3] of all ranks' atoms, Å."""
        return np.array(self._lammps.gather_atoms("x", 1, 3)).reshape(-1, 3)

    def cell(self) -> np.ndarray:
        """Cell vectors as rows [3, 3], Å."""
        low, high, xy, yz, xz, *_ = self._lammps.extract_box()
        x, y, z = np.subtract(high, low)
        return np.array([[x, 0.0, 0.0], [xy, y, 0.0], [xz, yz, z]])

    def close(self) -> None:
        """Free the instance and its files."""
        self._lammps.close()
        self._aliases.close()

    def reason(self, error: Exception) -> str:
        """The sentence of an error."""
        return self._aliases.real(error_message(error))

    def _vector(self, index: int) -> float:
        return float(self._lammps.extract_fix(FIX, 0, 1, index))


def _advance(
    engine: _Engine, task: ReplicaTask, attempt: Attempt, start: Atoms, trace: _Trace
) -> tuple[Literal["threshold", "step limit", "failed"], str]:
    """Run piece by piece; (how it ended, reason if it failed)."""
    for begin, end in _pieces(task):
        whole = end % _PIECE == 0 or end == task.steps  # the others only end where the trace has a record
        try:
            engine.run(end - begin, begin == 0, logged=begin == 0 or whole)
        except Exception as error:  # the only type that the LAMMPS module raises
            raise_if_box_is_thin(error)
            return "failed", f"LAMMPS stopped with an error: {engine.reason(error)}"
        stopped = engine.stopped()
        reason = _nonsense(engine, task, start) if whole or stopped else ""
        if reason:
            return "failed", reason
        trace.add(engine)
        if whole and engine.rank == 0:
            attempt.report(engine.step())
        if stopped:
            return "threshold", ""
    return "step limit", ""


def _pieces(task: ReplicaTask) -> Iterator[tuple[int, int]]:
    """(first, last step) of every piece; pieces end at the steps of the trace, too."""
    ends = {*range(_PIECE, task.steps, _PIECE), task.steps}
    if task.trace_every:
        ends |= set(range(task.trace_every, task.steps, task.trace_every))
    yield from pairwise([0, *sorted(ends)])


def _nonsense(engine: _Engine, task: ReplicaTask, start: Atoms) -> str:
    """Why the current state makes no sense, or an empty text."""
    if not np.isfinite(engine.positions()).all():
        return f"Positions are not finite at step {engine.step()}."
    # A biased replica may well be hotter than its thermostat; beyond this no bond survives.
    limit = 10.0 * task.temperature + 5000.0
    temperature = engine.temperature()
    if not temperature < limit:
        return f"The temperature is {temperature:.0f} K at step {engine.step()}, beyond {limit:.0f} K: it exploded."
    change = _cell_out_of_bounds(engine.cell(), start, task)
    return f"{change} (md.cell_limit), at step {engine.step()}." if change else ""


def _cell_out_of_bounds(cell: np.ndarray, start: Atoms, task: ReplicaTask) -> str:
    """How a cell [3, 3] differs too much from the start's, or an empty text (always in nvt).

    The deformation from one to the other has three principal stretches, whatever the orientation: the largest and the
    smallest factor by which a length has changed, shear included. Their product is the change of the volume.
    """
    if task.ensemble == "nvt":
        return ""
    stretches = np.linalg.svd(np.linalg.solve(start.cell[:], cell), compute_uv=False)
    factors = {"volume": stretches.prod(), "longest stretch": stretches[0], "shortest stretch": stretches[-1]}
    for name, factor in factors.items():
        if not 1.0 / task.cell_limit <= factor <= task.cell_limit:
            what = "volume" if name == "volume" else "cell, in one direction,"
            return f"The {what} is {factor:.3g} times that of the start, beyond a factor of {task.cell_limit:g}"
    return ""


def _finish(
    task: ReplicaTask,
    attempt: Attempt,
    stopped: Literal["threshold", "step limit", "failed"],
    reason: str,
    steps: int,
    bias_share: float,
    seconds: float,
) -> ReplicaResult:
    """Give the sane frames, log and trace their final names, and say how it went."""
    raw = count_frames(attempt.folder / _FRAMES)  # first: the process of a salvaged attempt may still be writing
    frames = list(_sane_frames(task, attempt.folder))
    if len(frames) < raw:
        last = int(frames[-1].info["step"]) if frames else 0
        insane = f"Atoms overlap or are lost, or the cell is out of bounds, after the frame of step {last}."
        stopped, reason, steps = "failed", reason or insane, min(steps, last + task.frames_every)
    _keep_log(task, attempt)
    attempt.remove(trace_file(task))
    # Where a failed replica stops to make sense is known for frames only.
    if stopped != "failed" and (attempt.folder / _TRACE).exists():
        attempt.put(_TRACE, trace_file(task))
    attempt.put_text(as_extxyz(frames), task.frames)
    return ReplicaResult(
        replica=task.replica,
        steps=steps,
        stopped=stopped,
        reason=reason,
        frames=len(frames),
        max_u=max((float(f.info["max_uncertainty"]) for f in frames), default=0.0),
        bias_share=bias_share,
        seconds=round(seconds, 3),
        ms_per_step=round(1000.0 * seconds / max(steps, 1), 4),
        ensemble=task.ensemble,
        temperature=task.temperature,
        pressure=task.pressure if task.ensemble == "npt" else None,
        force=task.force,
        stress=task.stress,
    )


def _sane_frames(task: ReplicaTask, folder: Path) -> Iterator[Atoms]:
    """Frames of the unfinished file up to the first that makes no sense.

    That is: cut short, not finite, with overlapping atoms, or with a cell out of bounds. They are in the start's state.
    """
    start = read_structures(task.start)[0]
    for frame in read_frames(folder / _FRAMES):
        if not np.isfinite(frame.cell[:]).all() or _cell_out_of_bounds(frame.cell[:], start, task):
            return
        try:
            check_geometry(frame, task.min_distance)
        except LabelError:
            return
        if not np.isfinite(frame.info["max_uncertainty"]):
            return
        frame.info["replica"] = task.replica
        take_state(frame, start, start.info.keys() - frame.info.keys())
        yield frame


def _system_commands(atoms: Atoms, task: ReplicaTask, neighbours: Neighbours) -> list[str]:
    """Box, types and masses; the pair style."""
    if task.ensemble == "npt" and not atoms.pbc.all():
        raise SimulationError("md.ensemble = 'npt' needs a periodic start structure; use 'nvt' for a molecule.")
    return system_commands(atoms, task.model, task.precision, neighbours)


def _dynamics_commands(task: ReplicaTask, folder: Path, symbols: list[str]) -> list[str]:
    """Velocities, integration at constant conditions, and the uncertainty fix."""
    every = min(task.frames_every, task.steps)
    stop = f" stop {task.threshold:.17g}" if np.isfinite(task.threshold) else ""
    return [
        f"velocity all create {task.temperature:.17g} {task.velocity_seed} mom yes rot yes dist gaussian",
        f"timestep {task.timestep / 1000.0:.17g}",
        f"thermo {_PIECE}",
        "thermo_modify lost error",
        *(_npt(task) if task.ensemble == "npt" else _nvt(task)),
        *_colvars(task, folder),
        f'fix {FIX} all ubmd {_bias_words(task, symbols)}save 0.0 "{folder / _FRAMES}" every {every}{stop}',
    ]


def _nvt(task: ReplicaTask) -> list[str]:
    """Langevin dynamics in the given cell."""
    temperature = f"{task.temperature:.17g}"
    return [
        "fix integrate all nve",
        f"fix thermostat all langevin {temperature} {temperature} {task.damping:.17g} {task.langevin_seed}",
    ]


def _npt(task: ReplicaTask) -> list[str]:
    """Nosé-Hoover thermostat and barostat; the barostat feels the bias stress through the virial of fix ubmd.

    Cells are never flipped: a frame's vectors go continuously over into the next one's. A cell that shears without end
    is out of bounds instead (or stops LAMMPS, where a tilt passes 1.5 lengths).
    """
    temperature = f"{task.temperature:.17g}"
    pressure = f"{task.pressure * _BAR_PER_MPA:.17g}"
    barostat = f"{task.coupling} {pressure} {pressure} {task.pressure_damping:.17g}"
    return [f"fix integrate all npt temp {temperature} {temperature} {task.damping:.17g} {barostat} flip no"]


def _colvars(task: ReplicaTask, folder: Path) -> list[str]:
    """Another bias, on collective variables, for comparisons. Its hills are forgotten at the end of the replica."""
    names = f'"{folder / "colvars"}" output "{folder / "colvars_out"}" seed {task.langevin_seed}'
    return [f"fix collective_variables all colvars {names}"] if task.colvars else []


def _bias_words(task: ReplicaTask, symbols: list[str]) -> str:
    """Keywords of the bias; without strength the fix is a monitor, evaluated as often as with it."""
    words = f"every {task.every} "
    if task.force == task.stress == 0.0:
        return words
    strengths = [f"{s} {x:.17g}" for s, x in task.species.items() if s in symbols]
    species = f"species {' '.join(strengths)} " if strengths else ""
    stress = f"stress {task.stress:.17g} " if task.stress else ""
    kind = "uncertainty atomic " if task.uncertainty == "atomic" else ""
    return f"force {task.force:.17g} {stress}{kind}{species}window {task.window} {words}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
