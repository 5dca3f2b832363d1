"""One replica: LAMMPS through its Python interface, in a worker process, files in and files out.

The fix writes frames to a folder of this attempt alone (`ubmd.attempts`) while the run goes on; frames, log and trace
have their own names once it has ended. Between segments of the run the replica is checked for invalid states (NaN,
extreme temperature, overlapping atoms, a cell out of bounds), and whether a part has left a slab or wire. However it
ends - threshold, step limit, desorption, LAMMPS error, crash of the whole process (`salvage`) - the frames up to the
last valid one are kept.

LAMMPS rotates cells (first vector along x, second in the xy plane), and frames of cells are rotated, too: positions,
cell and whatever is computed from them later belong together, in the rotated orientation.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
from ase import Atoms

from ubmd.attempts import Attempt, end_attempts
from ubmd.data.extxyz import as_extxyz
from ubmd.data.geometry import check_geometry, count_parts
from ubmd.data.periodicity import is_partly_periodic
from ubmd.data.state import take_state
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError, MachineError, SimulationError, UbmdError
from ubmd.faults import killed_by, killed_rank
from ubmd.lammps.box import Box, deformation
from ubmd.lammps.engine import ALONE, Company, Ending, MDEngine, ReplicaResult, ReplicaTask, trace_file
from ubmd.lammps.frames import count_frames, read_frames
from ubmd.lammps.plugin import check_shared_memory
from ubmd.lammps.session import (
    FixValue,
    Neighbours,
    Session,
    highest_temperature,
    leave_mpi,
    mobile_group,
    species_words,
    symbols_of,
    velocity_command,
    with_suitable_neighbours,
)
from ubmd.potentials.record import read_record

FIX = "bias"
_FRAMES = "frames.extxyz"  # in the folder of an attempt: as the fix writes them
_LOG = "log.lammps"
_TRACE = "trace.npz"
_GIVEN, _ENDED = "task.json", "ended.json"  # for the MPI ranks, and from them
_LOOK = 1.0  # s between two looks whether MPI ranks are still wanted
_PATIENCE = 10.0  # s for mpiexec to end its ranks
_PIECE = 500  # steps between checks; short enough to lose little, long enough to cost nothing
_BAR_PER_MPA = 10.0


def run_replica(
    task: ReplicaTask,
    note: Callable[[Attempt, ReplicaResult], None] | None = None,
    company: Company = ALONE,
) -> ReplicaResult:
    """Run a replica to its end and write its frames; see `ubmd.lammps.engine.MDEngine.run`.

    Raises:
        MachineError: a process of it was killed from outside, or MPI has no room in /dev/shm.
        TakenOver: another process has begun the same replica.
        SimulationError: the run could not be started (no LAMMPS, no plugin, no model, unknown element).
    """
    attempt = Attempt.begin(task.frames)
    _remove_old_leftovers(task)
    try:
        if task.ranks > 1:
            ended = _run_under_mpi(task, attempt)
        else:
            _, ended = _run_here(task, attempt, company)
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


_Ended = tuple[Ending, str, int, float, float]
"""(how, reason, steps, |F_bias| / |F|, wall time in s)"""


def _run_here(task: ReplicaTask, attempt: Attempt, company: Company = ALONE) -> tuple[int, _Ended]:
    """(MPI rank of this process, how the replica ended); all ranks of a replica call this."""
    return with_suitable_neighbours(lambda neighbours: _run_once(task, attempt, neighbours, company))


def _run_once(
    task: ReplicaTask, attempt: Attempt, neighbours: Neighbours, company: Company = ALONE
) -> tuple[int, _Ended]:
    """`_run_here` with one way to find neighbours; ThinBoxError if it is the wrong one."""
    atoms = read_structures(task.start)[0]
    trace = _Trace(task, atoms)
    with _session(task, attempt.folder, atoms, neighbours, company) as session:
        begin = company.seconds()
        stopped, reason = _advance(session, task, attempt, atoms, trace)
        seconds = company.seconds() - begin
        if session.rank == 0:
            trace.write(attempt)
        return session.rank, (stopped, reason, session.step(), session.fix_value(FIX, FixValue.BIAS_SHARE), seconds)


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
    """(exit code, output) of a program, which ends when the attempt is over."""
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
    leave_mpi()


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


class _Trace:
    """Positions, cell and largest uncertainty at a short stride, for autocorrelations; empty without ``trace_every``.

    The file holds ``numbers`` [n], ``timestep`` (fs), and per record ``step`` [T], ``positions`` [T, n, 3] (Å, float32,
    may jump by cell vectors), ``cell`` [T, 3, 3] (Å; zeros in free directions) and ``max_u`` [T] (eV/Å).
    """

    def __init__(self, task: ReplicaTask, atoms: Atoms) -> None:
        self._task = task
        self._atoms = atoms
        self._records: list[tuple[int, np.ndarray, np.ndarray, float]] = []

    def add(self, session: Session) -> None:
        """Record the current step, if it is due; all ranks call this."""
        every, step = self._task.trace_every, session.step()
        if every and step % every == 0:
            cell = np.where(self._atoms.pbc[:, None], session.cell(), 0.0)
            max_u = session.fix_value(FIX, FixValue.MAX_UNCERTAINTY)
            self._records.append((step, session.positions().astype(np.float32), cell, max_u))

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


@contextmanager
def _session(
    task: ReplicaTask, folder: Path, atoms: Atoms, neighbours: Neighbours = "bin", company: Company = ALONE
) -> Iterator[Session]:
    """LAMMPS with one replica's system and fixes, which writes to a folder."""
    with Session(folder / _LOG, task.model, company) as session:
        with session.setting_up():
            if task.ensemble == "npt" and not atoms.pbc.any():
                raise SimulationError("md.ensemble = 'npt' needs a periodic start structure; use 'nvt' for a molecule.")
            session.make_system(atoms, task.precision, neighbours, task.device)
            if task.colvars and session.rank == 0:
                (folder / "colvars").write_text(task.colvars)
            session.commands(_dynamics_commands(task, session.log.parent, atoms))
        yield session


def _advance(session: Session, task: ReplicaTask, attempt: Attempt, start: Atoms, trace: _Trace) -> tuple[Ending, str]:
    """Run segment by segment; (how it ended, reason if it failed or something was desorbed)."""
    parts = _Parts(task, start)
    for begin, end in _pieces(task):
        whole = end % _PIECE == 0 or end == task.steps  # the others only end where the trace has a record
        try:
            session.run(end - begin, begin == 0, logged=begin == 0 or whole)
        except SimulationError as error:
            return "failed", f"LAMMPS stopped with an error: {error}"
        stopped = session.fix_value(FIX, FixValue.STOPPED) > 0.5
        reason = _nonsense(session, task, start) if whole or stopped else ""
        if reason:
            return "failed", reason
        trace.add(session)
        if whole and session.rank == 0:
            attempt.report(session.step())
        if stopped:
            return "threshold", ""
        if whole and parts.are_more(session.positions(), session.cell()):
            return "desorbed", f"A part of the structure is more than {parts.cutoff:g} Å away from the rest."
    return "step limit", ""


class _Parts:
    """Whether a part of a slab or wire has left it: the model knows nothing of what is beyond its cutoff."""

    def __init__(self, task: ReplicaTask, start: Atoms) -> None:
        record = read_record(task.model) if is_partly_periodic(start) else None
        self.cutoff = 0.0 if record is None else float(record["cutoff"])  # 0: not asked
        self._start = start
        self._most = count_parts(start, self.cutoff) if self.cutoff else 0

    def are_more(self, positions: np.ndarray, cell: np.ndarray) -> bool:
        """Whether there are more separate parts than at the start, at positions [n, 3] in a cell [3, 3]."""
        if not self.cutoff:
            return False
        now = Atoms(self._start.numbers, positions, cell=cell, pbc=self._start.pbc)
        return count_parts(now, self.cutoff) > self._most


def _pieces(task: ReplicaTask) -> Iterator[tuple[int, int]]:
    """(first, last step) of every segment; segments end at the steps of the trace, too."""
    ends = {*range(_PIECE, task.steps, _PIECE), task.steps}
    if task.trace_every:
        ends |= set(range(task.trace_every, task.steps, task.trace_every))
    yield from pairwise([0, *sorted(ends)])


def _nonsense(session: Session, task: ReplicaTask, start: Atoms) -> str:
    """Why the current state is invalid, or an empty text."""
    if not np.isfinite(session.positions()).all():
        return f"Positions are not finite at step {session.step()}."
    limit = highest_temperature(task.temperature)
    temperature = session.temperature()
    if not temperature < limit:
        return f"The temperature is {temperature:.0f} K at step {session.step()}, beyond {limit:.0f} K: it exploded."
    change = _cell_out_of_bounds(session.cell(), start, task)
    return f"{change} (md.cell_limit), at step {session.step()}." if change else ""


def _cell_out_of_bounds(cell: np.ndarray, start: Atoms, task: ReplicaTask) -> str:
    """How a cell [3, 3] differs too much from the start's, or an empty text (always in nvt).

    The deformation from one to the other has three principal stretches, whatever the orientation: the largest and the
    smallest factor by which a length has changed, shear included. Their product is the change of the volume.
    """
    if task.ensemble == "nvt":
        return ""
    stretches = np.linalg.svd(deformation(cell, start), compute_uv=False)
    factors = {"volume": stretches.prod(), "longest stretch": stretches[0], "shortest stretch": stretches[-1]}
    for name, factor in factors.items():
        if not 1.0 / task.cell_limit <= factor <= task.cell_limit:
            what = "volume" if name == "volume" else "cell, in one direction,"
            return f"The {what} is {factor:.3g} times that of the start, beyond a factor of {task.cell_limit:g}"
    return ""


def _finish(
    task: ReplicaTask,
    attempt: Attempt,
    stopped: Ending,
    reason: str,
    steps: int,
    bias_share: float,
    seconds: float,
) -> ReplicaResult:
    """Give the valid frames, log and trace their final names, and say how it went."""
    raw = count_frames(attempt.folder / _FRAMES)  # first: the process of a salvaged attempt may still be writing
    frames = list(_sane_frames(task, attempt.folder))
    kept = _until_desorbed(task, frames)
    last = int(kept[-1].info["step"]) if kept else 0
    if len(kept) < len(frames):
        reason = f"A part of the structure was further from the rest than the model's cutoff from step {last} on."
        stopped, steps = "desorbed", last
    elif len(frames) < raw:
        invalid = f"Atoms overlap or are lost, or the cell is out of bounds, after the frame of step {last}."
        reason = reason if stopped == "failed" and reason else invalid
        stopped, steps = "failed", min(steps, last + task.frames_every)
    frames = kept
    _keep_log(task, attempt)
    attempt.remove(trace_file(task))
    # Where a failed replica becomes invalid is known for frames only.
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
    """Frames of the unfinished file before the first invalid one.

    That is: cut short, not finite, with overlapping atoms, or with a cell out of bounds. They are in the start's state,
    and in free directions they have its cell vectors.
    """
    start = read_structures(task.start)[0]
    box = Box(start) if is_partly_periodic(start) else None
    for frame in read_frames(folder / _FRAMES):
        if box is not None:
            frame.cell = box.cell(frame.cell[:])
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


def _until_desorbed(task: ReplicaTask, frames: list[Atoms]) -> list[Atoms]:
    """Frames up to the first one in which a part has left a slab or wire, that one included."""
    if not frames or not is_partly_periodic(frames[0]):
        return frames
    parts = _Parts(task, read_structures(task.start)[0])
    for number, frame in enumerate(frames, start=1):
        if parts.are_more(frame.positions, frame.cell[:]):
            return frames[:number]
    return frames


def _dynamics_commands(task: ReplicaTask, folder: Path, atoms: Atoms) -> list[str]:
    """Velocities, integration at constant conditions, and the uncertainty fix; fixed atoms have none of these."""
    every = min(task.frames_every, task.steps)
    stop = f" stop {task.threshold:.17g}" if np.isfinite(task.threshold) else ""
    words = _bias_words(task, symbols_of(atoms))
    return [
        velocity_command(atoms, task.temperature, task.velocity_seed),
        f"timestep {task.timestep / 1000.0:.17g}",
        f"thermo {_PIECE}",
        "thermo_modify lost error",
        *(_npt(task, Box(atoms)) if task.ensemble == "npt" else _nvt(task, mobile_group(atoms))),
        *_colvars(task, folder),
        f'fix {FIX} {mobile_group(atoms)} ubmd {words}save 0.0 "{folder / _FRAMES}" every {every}{stop}',
    ]


def _nvt(task: ReplicaTask, group: str) -> list[str]:
    """Langevin dynamics in the given cell."""
    temperature = f"{task.temperature:.17g}"
    return [
        f"fix integrate {group} nve",
        f"fix thermostat {group} langevin {temperature} {temperature} {task.damping:.17g} {task.langevin_seed}",
    ]


def _npt(task: ReplicaTask, box: Box) -> list[str]:
    """Nosé-Hoover thermostat and barostat; the barostat feels the bias stress through the virial of fix ubmd.

    Cells are never flipped: a frame's vectors go continuously over into the next one's. A cell that shears without end
    is out of bounds instead (or stops LAMMPS, where a tilt passes 1.5 lengths).
    """
    temperature = f"{task.temperature:.17g}"
    barostat = box.barostat(task.coupling, task.pressure * _BAR_PER_MPA, task.pressure_damping)
    return [f"fix integrate all npt temp {temperature} {temperature} {task.damping:.17g} {barostat} flip no"]


def _colvars(task: ReplicaTask, folder: Path) -> list[str]:
    """Another bias, on collective variables, for comparisons. Its hills are discarded at the end of the replica."""
    names = f'"{folder / "colvars"}" output "{folder / "colvars_out"}" seed {task.langevin_seed}'
    return [f"fix collective_variables all colvars {names}"] if task.colvars else []


def _bias_words(task: ReplicaTask, symbols: list[str]) -> str:
    """Keywords of the bias; without strength the fix is a monitor, evaluated as often as with it."""
    words = f"every {task.every} "
    if task.force == task.stress == 0.0:
        return words
    species = species_words(task.species, symbols)
    stress = f"stress {task.stress:.17g} " if task.stress else ""
    kind = "uncertainty atomic " if task.uncertainty == "atomic" else ""
    return f"force {task.force:.17g} {stress}{kind}{species}window {task.window} {words}"


class _Replicas:
    """Replicas in LAMMPS."""

    result_type = ReplicaResult
    run = staticmethod(run_replica)
    salvage = staticmethod(salvage)

    @staticmethod
    def output(task: ReplicaTask) -> Path:
        """The frames."""
        return task.frames


REPLICAS: MDEngine[ReplicaTask, ReplicaResult] = _Replicas()
"""LAMMPS as the engine of replicas"""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
