"""The stages of the loop as plain functions: perturb, label, split, run replicas, pool, select, measure.

They know nothing of the order in which the loop calls them, nor of caching. Long work goes to worker processes; each
piece of it leaves its own file behind, so that a resumed stage only does what is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.analysis import calibration_data
from ubmd.calculator import Evaluator, Prediction
from ubmd.data.structures import append_structures, read_structures, write_structures
from ubmd.errors import DataError, LabelError, SimulationError, UbmdError
from ubmd.lammps.replica import ReplicaResult, ReplicaTask, progress_file, run_replica, salvage
from ubmd.learning.run_folder import content_hash, file_hash, read_json, write_json
from ubmd.learning.tasks import label_file
from ubmd.learning.workers import TaskFailed, Workers, WorkersLost, outcome
from ubmd.selection import select
from ubmd.settings import BiasRampSettings, MDRampSettings, ReferenceSettings, RunSettings, StartSettings

_LARGEST_SEED = 900_000_000  # of LAMMPS's random-number generators
_POLL = 1.0  # s between two looks at running replicas
_TRIES = 2  # submissions of a task whose workers were lost for another reason

Done = Callable[[int, Any, UbmdError | None], None]


class Stage(IntEnum):
    """Stages that draw random numbers: part of the seed, so never renumber them."""

    START = 0
    SPLIT = 1
    TRAIN = 2
    MD = 3
    SELECT = 4


def random_generator(seed: int, iteration: int, stage: Stage, replica: int = 0) -> np.random.Generator:
    """The random numbers of one stage: independent of all others, the same whenever a run is repeated or resumed."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(iteration, int(stage), replica)))


# ------------------------------------------------------------------------------------------ start


def perturb(structures: Sequence[Atoms], settings: StartSettings, rng: np.random.Generator) -> list[Atoms]:
    """``settings.count`` copies, uniformly strained (fully periodic ones) and then uniformly displaced.

    Copy k comes from structure k modulo their number. The strain is symmetric, with six independent components;
    positions are rescaled with the cell.
    """
    copies = []
    for k in range(settings.count):
        source = structures[k % len(structures)]
        copy = Atoms(source.numbers, source.positions, cell=source.cell, pbc=source.pbc)
        if settings.strain > 0.0 and copy.pbc.all():
            upper = np.triu(rng.uniform(-settings.strain, settings.strain, (3, 3)))
            copy.set_cell(copy.cell[:] @ (np.eye(3) + (upper + upper.T) / 2.0), scale_atoms=True)
        copy.positions += rng.uniform(-settings.displacement, settings.displacement, copy.positions.shape)
        copies.append(copy)
    return copies


# ------------------------------------------------------------------------------------------ tasks in workers


def run_tasks(
    workers: Workers,
    function: Callable[..., Any],
    arguments: dict[int, tuple[Any, ...]],
    timeout: float,
    done: Done,
    tick: Callable[[], None] | None = None,
) -> None:
    """Run ``function(*arguments[i])`` for every i in workers and report each as it ends.

    Args:
        workers: where to run.
        function: importable by the workers.
        arguments: of each task.
        timeout: of each task, s from its start.
        done: called in the driver with (i, result, None) or (i, None, error), in order of completion.
        tick: called about once per second while tasks run.
    """
    tries = dict.fromkeys(arguments, 1)
    running: dict[Future[Any], int] = {}
    for index, values in arguments.items():
        running[workers.submit(function, *values, timeout=timeout)] = index
    while running:
        finished, _ = wait(running, timeout=_POLL, return_when=FIRST_COMPLETED)
        for future in finished:
            index = running.pop(future)
            try:
                done(index, outcome(future), None)
            except WorkersLost as error:
                if tries[index] == _TRIES:
                    done(index, None, error)
                    continue
                tries[index] += 1
                running[workers.submit(function, *arguments[index], timeout=timeout)] = index
            except (LabelError, SimulationError, TaskFailed) as error:
                done(index, None, error)
        if tick is not None:
            tick()


def prepare_folder(folder: Path, key: str) -> None:
    """Keep what an interrupted stage with the same inputs left in its folder; empty it otherwise."""
    mark = folder / "key"
    if mark.exists() and mark.read_text() == key:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.write_text(key)


# ------------------------------------------------------------------------------------------ labels


def label_batch(
    candidates: Sequence[Atoms],
    folder: Path,
    settings: ReferenceSettings,
    base: Path,
    workers: Workers,
    report: Callable[[int, str], None],
) -> tuple[list[Atoms], list[Atoms]]:
    """Label structures in workers; a failure of any kind costs one structure.

    Every label (``label_RRR.extxyz``) and every reason (``rejected_RRR.json``) is kept in ``folder`` as soon as it is
    known: an interrupted batch continues there. The results' order is that of the candidates, whatever ends first.

    Args:
        candidates: what to label; their info is kept.
        folder: for the files of this batch.
        settings: the reference.
        base: folder that its file arguments are relative to.
        workers: where to run.
        report: called as (index, reason or empty text) after each label.

    Returns:
        (labelled structures, rejected structures with their reason in ``info``).

    Raises:
        SettingsError: the reference's calculator cannot be made at all.
    """
    files = [(folder / f"candidate_{k:03d}.extxyz", folder / f"label_{k:03d}.extxyz") for k in range(len(candidates))]
    reasons = [folder / f"rejected_{k:03d}.json" for k in range(len(candidates))]
    for candidate, (source, _) in zip(candidates, files, strict=True):
        write_structures(source, [candidate])
    missing = {k: (*files[k], settings, base) for k in range(len(files)) if not _any_exists(files[k][1], reasons[k])}

    def done(index: int, _: None, error: UbmdError | None) -> None:
        if error is not None:
            write_json(reasons[index], {"reason": str(error)})
        report(index, str(error or ""))

    run_tasks(workers, label_file, missing, settings.timeout, done)
    return read_batch(folder)


def read_batch(folder: Path) -> tuple[list[Atoms], list[Atoms]]:
    """(labelled, rejected) structures of a finished `label_batch`."""
    labelled, rejected = [], []
    for source in sorted(folder.glob("candidate_*.extxyz")):
        number = source.stem.removeprefix("candidate_")
        label, reason = folder / f"label_{number}.extxyz", folder / f"rejected_{number}.json"
        if label.exists():
            labelled += read_structures(label)
        else:
            atoms = read_structures(source)[0]
            atoms.info["reason"] = " ".join(read_json(reason)["reason"].split())
            rejected.append(atoms)
    return labelled, rejected


def _any_exists(*paths: Path) -> bool:
    return any(path.exists() for path in paths)


def split_batch(n_training: int, n_validation: int, n_new: int, share: float, rng: np.random.Generator) -> list[str]:
    """'train' or 'valid' for each of ``n_new`` labels, so that ``share`` of all labels (at least 1) is validation.

    Labels that were split earlier keep their side (sticky split): what a model was trained on never calibrates a
    model that starts from it.
    """
    total = n_training + n_validation + n_new
    target = max(1, round(share * total))
    # Something must be left to train on.
    count = min(max(target - n_validation, 0), n_new if n_training else n_new - 1)
    chosen = set(rng.permutation(n_new)[:count].tolist())
    return ["valid" if k in chosen else "train" for k in range(n_new)]


def fresh_split(n_labels: int, share: float, rng: np.random.Generator) -> list[str]:
    """A random split of all labels, for models trained from scratch."""
    return split_batch(0, 0, n_labels, share, rng)


def append_once(path: Path, offset: int, labels: Sequence[Atoms], report: Callable[[int], None]) -> int:
    """Make bytes from ``offset`` on in an extxyz file begin with these structures; returns where they end.

    Appends one by one, each on disk before the next. What is already there stays; an unfinished rest of an earlier
    attempt is cut off first. Only the newest batch may be unfinished, so later batches are never touched.
    """
    scratch = path.with_name(f".{path.name}.new")
    write_structures(scratch, labels)
    content = scratch.read_bytes()
    scratch.unlink()
    present = path.read_bytes() if path.exists() else b""
    if len(present) < offset:
        raise DataError(f"{path} is shorter than the labels that were written to it; restore it from a copy.")
    if present[offset : offset + len(content)] == content:
        return offset + len(content)
    if path.exists():
        with path.open("r+b") as handle:
            handle.truncate(offset)
    for k, atoms in enumerate(labels):
        append_structures(path, [atoms])
        report(k)
    return offset + len(content)


# ------------------------------------------------------------------------------------------ MD


def replica_tasks(settings: RunSettings, iteration: int, model: Path, starts: Sequence[Path]) -> list[ReplicaTask]:
    """The replicas of an iteration.

    Replica r starts from ``starts[r % len]`` with its own random numbers; lists of temperatures and pressures are dealt
    out in the same way. Ramps count iterations from 0.
    """
    md, bias = settings.md, settings.bias
    ramp, bias_ramp = md.ramp or MDRampSettings(), bias.ramp or BiasRampSettings()
    temperatures = md.temperatures or [ramped(ramp.temperature, ramp.iterations, iteration, md.temperature)]
    pressures = md.pressures or [ramped(ramp.pressure, ramp.iterations, iteration, md.pressure)]
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
            )
        )
    return tasks


def ramped(ends: tuple[float, float] | None, length: int, iteration: int, constant: float) -> float:
    """The value of an iteration: linear from ``ends[0]`` in iteration 0 to ``ends[1]`` from ``length`` on."""
    if ends is None:
        return constant
    share = min(iteration / length, 1.0)
    return (1.0 - share) * ends[0] + share * ends[1]


def run_replicas(
    tasks: Sequence[ReplicaTask],
    timeout: float,
    workers: Workers,
    report: Callable[[ReplicaResult], None],
    progress: Callable[[list[int]], None],
) -> list[ReplicaResult]:
    """Run replicas in workers; those that an interrupted stage had finished are not run again.

    Args:
        tasks: the replicas.
        timeout: of each, s.
        workers: where to run.
        report: called with each result.
        progress: called about once per second with the steps of all replicas so far.

    Raises:
        SimulationError: not one replica has a frame.
    """
    results: dict[int, ReplicaResult] = {}
    for task in tasks:
        kept = _read_finished(task)
        if kept is not None:
            results[task.replica] = kept

    def done(index: int, result: ReplicaResult | None, error: UbmdError | None) -> None:
        final = result if result is not None else salvage(tasks[index], str(error))
        results[index] = final
        write_json(_finished_file(tasks[index]), {"task": _task_hash(tasks[index]), "result": final.model_dump()})
        report(final)

    def tick() -> None:
        progress([results[t.replica].steps if t.replica in results else _steps_so_far(t) for t in tasks])

    missing = {t.replica: (t,) for t in tasks if t.replica not in results}
    run_tasks(workers, run_replica, missing, timeout, done, tick)
    ordered = [results[task.replica] for task in tasks]
    if not any(result.frames for result in ordered):
        raise SimulationError(f"Every replica failed before its first frame; the first said: {ordered[0].reason}")
    return ordered


def _read_finished(task: ReplicaTask) -> ReplicaResult | None:
    """The kept result of a replica, or None if there is none for this very task."""
    if not _finished_file(task).exists() or not task.frames.exists():
        return None
    kept = read_json(_finished_file(task))
    return ReplicaResult.model_validate(kept["result"]) if kept["task"] == _task_hash(task) else None


def _finished_file(task: ReplicaTask) -> Path:
    return task.frames.with_name(f"replica_{task.replica:03d}.json")


def _task_hash(task: ReplicaTask) -> str:
    """Hash of everything that decides the trajectory; where its files lie does not."""
    values = task.model_dump(mode="json", exclude={"model", "start", "frames"})
    return content_hash([values, file_hash(task.model), file_hash(task.start)])


def _steps_so_far(task: ReplicaTask) -> int:
    try:
        return int(progress_file(task).read_text())
    except (FileNotFoundError, ValueError):
        return 0


# ------------------------------------------------------------------------------------------ pool and selection


def read_frames(path: Path) -> list[Atoms]:
    """Frames of a replica; none if it failed before its first."""
    return read_structures(path) if path.stat().st_size else []


def make_pool(frame_files: Iterable[Path]) -> list[Atoms]:
    """All frames of all replicas; start structures that several replicas share come once."""
    pool: list[Atoms] = []
    seen: set[bytes] = set()
    for path in frame_files:
        for frame in read_frames(path):
            key = frame.positions.tobytes() + frame.cell[:].tobytes()
            if key not in seen:
                seen.add(key)
                pool.append(frame)
    return pool


def select_batch(
    pool: Sequence[Atoms], training: Sequence[Atoms], model: Path, count: int, settings: RunSettings, iteration: int
) -> tuple[list[Atoms], dict[str, Any]]:
    """(chosen frames with where they come from in ``info``, what selected.json holds)."""
    evaluator = Evaluator(model, settings.md.precision)
    candidates, known = evaluator.predict(pool), evaluator.predict(training)
    chosen = select(
        settings.selection.method,
        np.array([p.feature for p in candidates]),
        np.array([p.feature for p in known]),
        np.array([p.u for p in candidates]),
        count,
        settings.uncertainty.lambda2,
        settings.selection.noise,
        settings.selection.duplicate_tolerance,
        random_generator(settings.seed, iteration, Stage.SELECT),
    )
    records = [_selection_record(pool[k], candidates[k]) for k in chosen]
    structures = [_selected_structure(pool[k], iteration, record) for k, record in zip(chosen, records, strict=True)]
    return structures, {"pool": len(pool), "wanted": count, "selected": records}


def _selection_record(frame: Atoms, prediction: Prediction) -> dict[str, Any]:
    return {
        "replica": int(frame.info["replica"]),
        "step": int(frame.info["step"]),
        "u": prediction.u,
        "max_u": float(prediction.atomic_u.max()),
    }


def _selected_structure(frame: Atoms, iteration: int, record: dict[str, Any]) -> Atoms:
    copy = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
    copy.info |= {"iteration": iteration, "replica": record["replica"], "step": record["step"]}
    return copy


# ------------------------------------------------------------------------------------------ errors


def errors_of(evaluator: Evaluator, structures: Sequence[Atoms]) -> dict[str, float]:
    """Root mean square errors: energy per atom (meV/atom), force components (eV/Å); their number of structures."""
    data = calibration_data(structures, evaluator.predict(structures))
    return {
        "energy_rmse_mev_per_atom": data.energy_rmse,
        "force_rmse": data.force_rmse,
        "structures": len(structures),
    }
