"""Replicas of an iteration: what each is to run, their results, and those that are still running."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ubmd.attempts import steps_so_far
from ubmd.data.extxyz import write_structures
from ubmd.data.state import structures_hash
from ubmd.data.structures import (
    read_structures,
)
from ubmd.errors import SimulationError, UbmdError
from ubmd.files import (
    check_space,
    content_hash,
    file_hash,
    read_json,
    write_json,
)
from ubmd.lammps.engine import ReplicaResult, ReplicaTask
from ubmd.lammps.group import most_at_once
from ubmd.lammps.replica import REPLICAS
from ubmd.learning.loop.advice import after_first_replicas
from ubmd.learning.loop.turn import Origin, Turn
from ubmd.learning.work.groups import TaskGroup, note_losses, nothing_ended
from ubmd.learning.work.tasks import MDJob, run_together
from ubmd.learning.work.workers import Executor, WorkersLost
from ubmd.runs.folder import EventLog, RunFolder
from ubmd.runs.records import IterationEntry
from ubmd.runs.seeds import Stage, random_generator
from ubmd.settings import BiasRampSettings, MDRampSettings, RunSettings

_LARGEST_SEED = 900_000_000  # of LAMMPS's random-number generators
_RAISED = 1.25  # see `threshold_of`


def replica_tasks(
    settings: RunSettings, iteration: int, model: Path, starts: Sequence[Path], base: Path = Path()
) -> list[ReplicaTask]:
    """The replicas of an iteration.

    Replica r starts from ``starts[r % len]`` with its own random numbers; lists of temperatures and pressures are
    distributed in the same way. Ramps count iterations from 0. ``base``: folder that md.colvars is relative to.
    """
    md, bias = settings.md, settings.bias
    ramp, bias_ramp = md.ramp or MDRampSettings(), bias.ramp or BiasRampSettings()
    temperatures = md.temperatures or [ramped(ramp.temperature, ramp.iterations, iteration, md.temperature)]
    pressures = md.pressures or [ramped(ramp.pressure, ramp.iterations, iteration, md.pressure)]
    colvars = (base / md.colvars).read_text() if md.colvars is not None else ""
    folder = model.parent
    tasks = []
    for r in range(md.replicas):
        seeds = random_generator(settings.seed, iteration, Stage.MD, r).integers(1, _LARGEST_SEED, 2)
        tasks.append(
            ReplicaTask(
                replica=r,
                model=model,
                start=starts[r % len(starts)],
                frames=folder / f"frames_{r:03d}.extxyz",
                steps=md.steps,
                timestep=md.timestep,
                temperature=temperatures[r % len(temperatures)],
                damping=md.damping,
                ensemble=md.ensemble,
                pressure=pressures[r % len(pressures)],
                pressure_damping=md.pressure_damping,
                coupling=md.coupling,
                cell_limit=md.cell_limit,
                frames_every=md.frames_every,
                precision=md.precision,
                device=md.device,
                force=ramped(bias_ramp.force, bias_ramp.iterations, iteration, bias.force),
                stress=ramped(bias_ramp.stress, bias_ramp.iterations, iteration, bias.stress),
                uncertainty=bias.uncertainty,
                species=bias.species,
                window=bias.window,
                every=bias.every,
                threshold=settings.loop.threshold,
                velocity_seed=int(seeds[0]),
                langevin_seed=int(seeds[1]),
                min_distance=settings.reference.min_distance,
                ranks=md.ranks,
                trace_every=md.trace_every,
                colvars=colvars,
            )
        )
    return tasks


def threshold_of(history: Sequence[IterationEntry], labels: int, threshold: float) -> float:
    """The largest u_i at which the replicas of the next iteration stop, eV/Å: ``threshold``, as a rule.

    Replicas start from structures that are known. If all of them are above the threshold already there, because the
    calibration has changed, no frame is new. The next model has nothing new to learn and would end likewise, so the
    threshold is `_RAISED` times the largest u_i that they met, until there is a new label.

    Args:
        history: of the earlier iterations.
        labels: that there are now.
        threshold: ``loop.threshold``, eV/Å.
    """
    for entry in reversed(history):
        at_start = all(replica.stopped == "threshold" and replica.steps == 0 for replica in entry.replicas)
        if entry.labels != labels or not entry.replicas or not at_start:
            break
        threshold = max(threshold, _RAISED * max(replica.max_u for replica in entry.replicas))
    return threshold


def ramped(ends: tuple[float, float] | None, length: int, iteration: int, constant: float) -> float:
    """The value of an iteration: linear from ``ends[0]`` in iteration 0 to ``ends[1]`` from ``length`` on."""
    if ends is None:
        return constant
    share = min(iteration / length, 1.0)
    return (1.0 - share) * ends[0] + share * ends[1]


def run_replicas(
    tasks: Mapping[Origin, ReplicaTask],
    group: TaskGroup,
    model_keys: Mapping[int, str],
    report: Callable[[ReplicaResult], None],
    progress: Callable[[list[int]], None],
    share: float = 1.0,
    together: int = 1,
) -> dict[Origin, ReplicaResult]:
    """Run replicas in workers; those that an interrupted stage had finished are not run again.

    Args:
        tasks: the replicas of this iteration, and those that earlier ones left running.
        group: where they run, or run already; its function is `ubmd.learning.work.tasks.run_md`, or `run_together`.
        model_keys: of each iteration's model.
        report: called with each result.
        progress: called about once per second with the steps of all replicas so far.
        share: of the replicas to wait for.
        together: replicas that a worker may run at once.

    Returns:
        Results of the replicas that have ended, in order. Those still running are left in the group; those that have
        not begun are removed from it.

    Raises:
        SimulationError: no replica that has ended has a frame.
        StorageError: the disk is full.
        MachineError: not a single replica was completed, by a fault of the machine.
    """
    jobs = {origin: _job(task, model_keys[origin[0]], together > 1) for origin, task in tasks.items()}
    results = {origin: kept for origin, job in jobs.items() if origin not in group.running() and (kept := job.kept())}
    enough = math.ceil(share * len(tasks))
    lost: dict[Origin, UbmdError] = {}

    def done(origin: Origin, result: ReplicaResult | None, error: UbmdError | None) -> None:
        result = result or jobs[origin].kept()  # else only the reply was lost
        if result is None and isinstance(error, WorkersLost):
            lost[origin] = error
            return
        if result is None:
            check_space(tasks[origin].frames.parent)
            result = jobs[origin].salvage(str(error))
        results[origin] = result
        report(result)

    def tick() -> None:
        progress([results[o].steps if o in results else steps_so_far(t.frames) or 0 for o, t in tasks.items()])

    group.add({origin: (job,) for origin, job in jobs.items() if origin not in results}, together)
    group.wait(done, tick, lambda: len(results) + len(lost) >= enough)
    group.withdraw()
    if lost:
        check_space(next(iter(tasks.values())).frames.parent)
    if lost and not results:
        raise nothing_ended("replica", next(iter(lost.values())))
    for origin, error in lost.items():  # they are not run again: what they have explored counts
        results[origin] = jobs[origin].salvage(str(error))
        report(results[origin])
    ordered = {origin: results[origin] for origin in sorted(results)}
    if not any(result.frames for result in ordered.values()):
        reason = next(iter(ordered.values())).reason
        for origin in ordered:  # on resuming something has been fixed, LAMMPS perhaps: try them again then
            jobs[origin].finished.unlink(missing_ok=True)
        raise SimulationError(f"Every replica failed before its first frame; the first reason: {reason}")
    return ordered


def frames_are_damaged(frames: Path) -> bool:
    """Whether the frames of a finished replica are there, but not as it left them."""
    try:
        kept = read_json(frames.with_name(frames.stem.replace("frames", "replica") + ".json"))
        return frames.exists() and kept["sha256"] != file_hash(frames)
    except (OSError, ValueError, KeyError):
        return frames.exists()


def _job(task: ReplicaTask, model_key: str, shares: bool) -> MDJob[ReplicaTask, ReplicaResult]:
    finished = task.frames.with_name(f"replica_{task.replica:03d}.json")
    return MDJob(REPLICAS, task, _task_key(task, model_key), finished, shares)


def settled(task: ReplicaTask) -> dict[str, Any]:
    """All of a task that decides its trajectory, except model and start structure: no paths."""
    # The key of a task without Colvars is what it was before Colvars were supported: older run folders can be resumed.
    absent: set[str] = set() if task.colvars else {"colvars"}
    return task.model_dump(mode="json", exclude={"model", "start", "frames", "trace_every", "device"} | absent)


def _task_key(task: ReplicaTask, model_key: str) -> str:
    """Hash of everything that determines the trajectory; the location of its files does not."""
    starts = read_structures(task.start)
    return content_hash([settled(task), model_key, structures_hash(starts, starts[0].info)])


class Replicas:
    """The replicas of a run; those of an asynchronous loop may outlive the iteration that they began in.

    Attributes:
        left: replicas of earlier iterations that are still running.
    """

    def __init__(
        self, settings: RunSettings, base: Path, folder: RunFolder, workers: Executor, events: EventLog
    ) -> None:
        """``settings``: those that the run was started with; ``base``: folder that md.colvars is relative to."""
        self.left: dict[Origin, ReplicaTask] = {}
        self._base = base
        self._folder = folder
        self._events = events
        self._group = TaskGroup(
            workers,
            run_together,
            settings.md.timeout,
            settings.workers.retries,
            _replicas_at_once(settings, workers),
            lambda origin, *loss: note_losses(events, "replica", iteration=origin[0])(origin, *loss),
            many=True,
        )

    def tasks(self, settings: RunSettings, iteration: int, files: list[Path], model: Path) -> dict[Origin, ReplicaTask]:
        """New replicas of an iteration: those whose earlier ones are not still running."""
        tasks = replica_tasks(settings, iteration, model, files, self._base)
        busy = {replica for _, replica in self.left}
        return {(iteration, task.replica): task for task in tasks if task.replica not in busy}

    def run(self, turn: Turn, model_keys: Mapping[int, str]) -> None:
        """Run those of an iteration; leaves frames_RRR.extxyz, replicas.json, and left.json with those still running.

        ``model_keys``: of each iteration's model.
        """
        tasks = self.left | turn.tasks
        target, left = turn.once.folder / "replicas.json", turn.once.folder / "left.json"
        for path, atoms in turn.starts.items():
            write_structures(path, [atoms])
        loop = turn.settings.loop

        def report(result: ReplicaResult) -> None:
            self._events.write("replica_done", iteration=turn.iteration, **result.model_dump())

        def progress(steps: Sequence[int]) -> None:
            self._events.show("md_steps", iteration=turn.iteration, steps=steps, limit=turn.settings.md.steps)

        def work() -> None:
            raised = max((task.threshold for task in turn.tasks.values()), default=0.0)
            if raised > loop.threshold:
                text = (
                    f"All replicas were above loop.threshold = {loop.threshold:g} eV/Å where they started, so that no "
                    f"frame was new. They stop at {raised:.3g} eV/Å until there is a new label."
                )
                self._events.write("remark", text=text)
            share = loop.asynchronous_share if loop.asynchronous else 1.0
            together = _most_together(turn)
            results = run_replicas(tasks, self._group, model_keys, report, progress, share, together)
            running = self._group.running()
            write_json(left, sorted(origin for origin in tasks if origin in running - set(results)))
            own = {origin: result.model_dump() for origin, result in results.items()}
            write_json(
                target,
                [r if o[0] == turn.iteration else {"iteration": o[0], **r} for o, r in own.items()],
            )
            advice = after_first_replicas(list(results.values()), turn.settings, list(turn.starts.values()))
            if advice and turn.iteration == 0:
                self._events.write("remark", text=advice)

        turn.once.run("md", turn.keys["md"], lambda: [target, left, *self.frame_files(turn)], work)
        self.read_left(turn)

    def read_left(self, turn: Turn) -> None:
        """Record the replicas that were still running when an iteration selected its batch."""
        path = turn.once.folder / "left.json"
        tasks = self.left | turn.tasks
        self.left = {tuple(origin): tasks[tuple(origin)] for origin in read_json(path)} if path.exists() else {}

    def frame_files(self, turn: Turn) -> list[Path]:
        """Frames of the replicas that ended in an iteration, in the order of their (iteration, replica)."""
        path = turn.once.folder / "replicas.json"
        results = read_json(path) if path.exists() else []
        folders = [self._folder.iteration(result.get("iteration", turn.iteration)) for result in results]
        return [f / f"frames_{r['replica']:03d}.extxyz" for f, r in zip(folders, results, strict=True)]


def _most_together(turn: Turn) -> int:
    """How many replicas of an iteration a worker may run at once: in an asynchronous loop each ends by itself."""
    md = turn.settings.md
    if turn.settings.loop.asynchronous or not turn.tasks:
        return 1
    n_atoms = max(len(atoms) for atoms in turn.starts.values())
    task = next(iter(turn.tasks.values()))
    most = most_at_once(task.model, task.colvars, task.ranks, n_atoms)
    return most if md.together is None or most == 1 else md.together


def _replicas_at_once(settings: RunSettings, workers: Executor) -> int | None:
    """Replicas of several ranks take several workers' cores; an asynchronous loop keeps one worker for labels."""
    if settings.md.ranks == 1 and not settings.loop.asynchronous:
        return None  # the executor queues them
    free = workers.processes - (1 if settings.loop.asynchronous else 0)
    return max(1, free // settings.md.ranks)
