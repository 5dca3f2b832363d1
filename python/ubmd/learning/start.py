"""The stages of the loop as plain functions: perturb, label, split, run replicas, pool, select, measure.

They know nothing of the order in which the loop calls them, nor of caching. Long work goes to worker processes; each
piece of it leaves its own file behind, so that a resumed stage only does what is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.attempts import steps_so_far
from ubmd.calculator import Evaluator, Prediction
from ubmd.data.geometry import check_apart
from ubmd.data.state import bare, check_state, mixed_states, state_hash, structures_hash
from ubmd.data.structures import (
    append_structures,
    as_extxyz,
    fixed_atoms,
    labels_of,
    read_structures,
    repair_structures,
    write_structures,
)
from ubmd.errors import DataError, LabelError, SettingsError, SimulationError, UbmdError, one_line
from ubmd.files import (
    check_space,
    content_hash,
    file_hash,
    is_intact,
    is_sealed,
    keep_copy,
    move_aside,
    read_json,
    seal,
    write_json,
    write_text,
)
from ubmd.lammps.replica import ReplicaResult, ReplicaTask, salvage
from ubmd.learning.work.groups import Lost, TaskGroup, nothing_ended, run_tasks
from ubmd.learning.work.tasks import label_file, note_replica, read_finished
from ubmd.learning.work.workers import Executor, WorkersLost
from ubmd.references.labels import check_geometry
from ubmd.selection import select
from ubmd.settings import BiasRampSettings, MDRampSettings, ReferenceSettings, RunSettings, StartSettings

_LARGEST_SEED = 900_000_000  # of LAMMPS's random-number generators
# Earlier versions rejected structures for good when a machine had lost them; their reasons begin like this.
_OLD_LOSSES = ("The executor lost the task (", "The worker process was lost (", "The worker process was stopped.")


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


def check_start(structures: Sequence[Atoms], settings: RunSettings) -> None:
    """What is wrong with the start structures shows before anything is labelled or written.

    Raises:
        SettingsError: they don't fit the ensemble, one that replicas start from cannot be moved, or one has two atoms
            at the same place.
    """
    if settings.md.ensemble == "npt" and not all(atoms.pbc.all() for atoms in structures):
        raise SettingsError(
            f"md.ensemble = 'npt' needs start structures that are periodic in all directions, but "
            f"{settings.start.file} has one that is not; use 'nvt' for molecules."
        )
    for k, atoms in enumerate(structures):
        name = f"{settings.start.file}, structure {k}," if len(structures) > 1 else str(settings.start.file)
        if k == 0 or settings.md.start_from == "labelled":
            check_periodicity(atoms, name)
        if k == 0:
            check_movable(atoms, name, settings.reference.min_distance)
        try:
            check_apart(atoms)
        except DataError as error:
            raise SettingsError(f"{name} cannot be labelled: {error}") from None


def check_periodicity(atoms: Atoms, name: str) -> None:
    """SettingsError if a structure is periodic in one or two directions; ``name`` is what the sentence calls it."""
    if atoms.pbc.any() and not atoms.pbc.all():
        flags = " ".join("T" if periodic else "F" for periodic in atoms.pbc)
        raise SettingsError(
            f'{name} is periodic in some directions only (pbc = "{flags}"), but MD needs all three or none: make a '
            "slab or a wire periodic in all three, with an empty gap between the copies that is wider than the cutoff."
        )


def check_movable(atoms: Atoms, name: str, min_distance: float) -> None:
    """SettingsError if MD cannot even begin with a structure; ``name`` is what the sentence calls it."""
    if len(atoms) == 1:
        raise SettingsError(f"{name} has a single atom, which has nothing to move against; repeat its cell.")
    try:
        check_geometry(atoms, min_distance)
    except LabelError as error:
        raise SettingsError(f"{name}: {error}") from None


def check_states(structures: Sequence[Atoms], settings: RunSettings) -> None:
    """Can start structures be labelled and learnt in the states (charge, spin, moments, masses) that they have?

    Raises:
        SettingsError: a mass or moment that makes no sense, a constraint that is not FixAtoms, or structures of one
            composition in different states, unless start.mixed_states allows them.
    """
    for number, atoms in enumerate(structures):
        try:
            check_state(atoms, settings.reference.info)
            fixed_atoms(atoms)
        except DataError as error:
            raise SettingsError(f"{settings.start.file}, frame {number}: {error}") from None
    mixed = next(mixed_states(structures, settings.reference.info), None)
    if mixed is not None and not settings.start.mixed_states:
        first, second, difference = mixed
        raise SettingsError(
            f"{settings.start.file}: frames {first} and {second} have the same composition but {difference}, which a "
            "model cannot tell apart: start from one state, or set start.mixed_states = true."
        )


def perturb(
    structures: Sequence[Atoms], settings: StartSettings, rng: np.random.Generator, info: Sequence[str] = ()
) -> list[Atoms]:
    """``settings.count`` copies, uniformly strained (fully periodic ones) and then uniformly displaced.

    Copy k comes from structure k modulo their number, in the state of that structure (``info``: the keys of
    ``atoms.info`` that belong to it); constraints are left behind. The strain is symmetric, with six independent
    components; positions are rescaled with the cell.
    """
    copies = []
    for k in range(settings.count):
        copy = bare(structures[k % len(structures)], info)
        if settings.strain > 0.0 and copy.pbc.all():
            upper = np.triu(rng.uniform(-settings.strain, settings.strain, (3, 3)))
            copy.set_cell(copy.cell[:] @ (np.eye(3) + (upper + upper.T) / 2.0), scale_atoms=True)
        copy.positions += rng.uniform(-settings.displacement, settings.displacement, copy.positions.shape)
        copies.append(copy)
    return copies


# ------------------------------------------------------------------------------------------ folders of stages


def prepare_folder(folder: Path, key: str) -> None:
    """Keep what an interrupted stage with the same inputs left in its folder; move anything else aside."""
    mark = folder / "key"
    if mark.exists() and mark.read_text() == key:
        return
    move_aside(folder, folder.parent / "aside")
    write_text(mark, key)


# ------------------------------------------------------------------------------------------ labels


def label_batch(
    candidates: Sequence[Atoms],
    folder: Path,
    settings: ReferenceSettings,
    base: Path,
    workers: Executor,
    report: Callable[[int, str], None],
    known: Sequence[Atoms] = (),
    retries: int = 0,
    lost: Lost = lambda key, error, again: None,
) -> None:
    """Label structures in workers; a failure of any kind costs one structure.

    Every label (``label_RRR.extxyz``, sealed) and every reason (``rejected_RRR.json``) is kept in ``folder`` as soon as
    it is known: an interrupted batch continues there. Structures that the machine lost again and again while others
    came to an end are postponed (``postponed_RRR.json``): neither labelled nor rejected. For the results see
    `read_batch` and `read_postponed`.

    Args:
        candidates: what to label; their info is kept.
        folder: for the files of this batch.
        settings: the reference.
        base: folder that its file arguments are relative to.
        workers: where to run.
        report: called as (index, reason or empty text) after each label.
        known: labels that the data set already has; a lost or damaged file is written again from them.
        retries: how often a structure is tried again whose worker crashed or was lost.
        lost: called when that happens; see `TaskGroup`.

    Raises:
        SettingsError: the reference's calculator cannot be made at all.
        StorageError: the disk is full; no structure is rejected for that.
        MachineError: not a single structure came to an end, by a fault of the machine.
    """
    keys = [label_key(candidate, settings) for candidate in candidates]
    files = [(folder / f"candidate_{k:03d}.extxyz", folder / f"label_{k:03d}.extxyz") for k in range(len(candidates))]
    reasons = [folder / f"rejected_{k:03d}.json" for k in range(len(candidates))]
    for candidate, (source, _) in zip(candidates, files, strict=True):
        write_structures(source, [candidate])
    mend_batch(folder, known, settings)
    for note in folder.glob("postponed_*.json"):  # of a driver that was killed here: asked again now
        note.unlink()
    missing = {}
    for k, (source, target) in enumerate(files):
        if is_sealed(target, keys[k]) or _read_reason(reasons[k], keys[k]):
            continue
        missing[k] = (source, target, keys[k], settings, base)

    postponed: dict[int, UbmdError] = {}

    def done(index: int, _: None, error: UbmdError | None) -> None:
        if isinstance(error, WorkersLost) and is_sealed(files[index][1], keys[index]):
            error = None  # only the answer was lost
        if isinstance(error, WorkersLost):
            postponed[index] = error
            return
        if error is not None:
            check_space(folder)
            write_json(reasons[index], {"reason": str(error), "key": keys[index]})
        report(index, str(error or ""))

    run_tasks(workers, label_file, missing, settings.timeout, done, retries=retries, lost=lost)
    if postponed:
        check_space(folder)
    if postponed and len(postponed) == len(missing):
        raise nothing_ended("label", next(iter(postponed.values())))
    for index, error in postponed.items():
        write_json(folder / f"postponed_{index:03d}.json", {"reason": str(error)})


def label_key(candidate: Atoms, settings: ReferenceSettings) -> str:
    """Hash of what decides a label."""
    return content_hash([structures_hash([candidate], settings.info), reference_key(settings)])


def reference_key(settings: ReferenceSettings) -> str:
    """Hash of the reference without what belongs to a machine, or to the structures, rather than to the label."""
    values = settings.model_dump(mode="json", exclude={"timeout", "environment", "cache", "info"})
    if not settings.noise:  # a key that older runs did not have
        del values["noise"]
    return content_hash(values)


def mend_batch(folder: Path, known: Sequence[Atoms], settings: ReferenceSettings) -> None:
    """Write lost or damaged label files of a batch again from the labels that the data set has."""
    at = {_place(atoms, settings.info): atoms for atoms in known}
    for source in folder.glob("candidate_*.extxyz"):
        number = source.stem.removeprefix("candidate_")
        target = folder / f"label_{number}.extxyz"
        if is_intact(target) or _has_verdict(folder, number):
            continue
        try:
            candidate = read_structures(source)[0]
        except DataError:
            continue
        place = _place(candidate, settings.info)
        if place in at:
            write_structures(target, [_with_labels_of(candidate, at[place])])
            seal(target, label_key(candidate, settings))


def forget_rejections(folder: Path) -> None:
    """Let `label_batch` try again what it has rejected."""
    for path in folder.glob("rejected_*.json"):
        path.unlink()


def free_lost(folder: Path) -> bool:
    """Let `label_batch` ask again for what an earlier version rejected for a fault of the machine; was there any?"""
    freed = False
    for path in folder.glob("rejected_*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if str(read_json(path)["reason"]).startswith(_OLD_LOSSES):
                path.unlink()
                freed = True
    return freed


def batch_is_whole(folder: Path) -> bool:
    """Whether every structure of a labelled batch still has its undamaged label, or a note why it has none."""
    numbers = (source.stem.removeprefix("candidate_") for source in folder.glob("candidate_*.extxyz"))
    return all(is_intact(folder / f"label_{number}.extxyz") or _has_verdict(folder, number) for number in numbers)


def _has_verdict(folder: Path, number: str) -> bool:
    """Whether a note says why a structure has no label."""
    return any((folder / f"{kind}_{number}.json").exists() for kind in ("rejected", "postponed"))


def read_batch(folder: Path) -> tuple[list[Atoms], list[Atoms]]:
    """(labelled structures, rejected ones with their reason in ``info``) of a finished `label_batch`, in its order."""
    labelled, rejected = [], []
    for source in sorted(folder.glob("candidate_*.extxyz")):
        number = source.stem.removeprefix("candidate_")
        label, reason = folder / f"label_{number}.extxyz", folder / f"rejected_{number}.json"
        if reason.exists():
            atoms = read_structures(source)[0]
            atoms.info["reason"] = one_line(read_json(reason)["reason"])
            rejected.append(atoms)
        elif label.exists():
            labelled += read_structures(label)
    return labelled, rejected


def read_postponed(folder: Path) -> list[Atoms]:
    """Structures that a finished `label_batch` has postponed, in its order."""
    notes = sorted(folder.glob("postponed_*.json"))
    sources = [note.with_name(note.stem.replace("postponed", "candidate") + ".extxyz") for note in notes]
    return [read_structures(source)[0] for source in sources]


def _read_reason(path: Path, key: str) -> str:
    """Why a structure was rejected; empty if it was not, or if the file is damaged or about another one."""
    try:
        kept = read_json(path)
    except (OSError, ValueError):
        return ""
    return str(kept["reason"]) if kept.get("key") == key else ""


def _place(atoms: Atoms, info: Sequence[str]) -> str:
    """Hash of a structure and its state, without labels."""
    return structures_hash([bare(atoms, info)], info)


def _with_labels_of(candidate: Atoms, known: Atoms) -> Atoms:
    copy = candidate.copy()
    copy.calc = SinglePointCalculator(copy, **labels_of(known))
    return copy


def split_batch(
    n_training: int,
    n_validation: int,
    n_new: int,
    share: float,
    rng: np.random.Generator,
    n_calibration: int = 0,
    calibration_share: float = 0.0,
) -> list[str]:
    """'train', 'valid' or 'calib' for each of ``n_new`` labels.

    ``share`` of all labels (at least 1) is validation, ``calibration_share`` (at least 1, or none at 0) calibration.

    Labels that were split earlier keep their side (sticky split): what a model was trained on never calibrates a
    model that starts from it.
    """
    total = n_training + n_validation + n_calibration + n_new
    target = max(1, round(share * total))
    # Something must be left to train on.
    free = n_new if n_training else n_new - 1
    count = min(max(target - n_validation, 0), free)
    calibrating = max(1, round(calibration_share * total)) if calibration_share else 0
    order = rng.permutation(n_new).tolist()
    sides = ["train"] * n_new
    for k in order[:count]:
        sides[k] = "valid"
    for k in order[count : min(count + max(calibrating - n_calibration, 0), free)]:
        sides[k] = "calib"
    return sides


def fresh_split(n_labels: int, share: float, rng: np.random.Generator) -> list[str]:
    """A random split of all labels, for models trained from scratch."""
    return split_batch(0, 0, n_labels, share, rng)


def fresh_sides(sides: Sequence[str], share: float, rng: np.random.Generator) -> list[str]:
    """Sides for a model from scratch: calibration labels stay what they are, `fresh_split` deals out the others."""
    others = [k for k, side in enumerate(sides) if side != "calib"]
    new = list(sides)
    for k, side in zip(others, fresh_split(len(others), share * len(sides) / len(others), rng), strict=True):
        new[k] = side
    return new


def append_once(path: Path, offset: int, labels: Sequence[Atoms], report: Callable[[int], None]) -> int:
    """Make bytes from ``offset`` on in an extxyz file begin with these structures; returns where they end.

    Appends one by one, each on disk before the next. What is already there stays; an unfinished frame of an earlier
    attempt is cut off first. Only the newest batch may be unfinished, so later batches are never touched. A file that
    goes on differently is kept aside before it is cut: no label is ever lost.
    """
    frames = [as_extxyz([atoms]).encode() for atoms in labels]
    content = b"".join(frames)
    present = path.read_bytes() if path.exists() else b""
    if len(present) < offset:
        raise DataError(f"{path} is shorter than the labels that were written to it; restore it from a copy.")
    rest = present[offset:]
    if rest.startswith(content):
        return offset + len(content)
    complete = 0  # frames of an interrupted attempt
    if content.startswith(rest):
        complete = sum(len(rest) >= end for end in itertools.accumulate(map(len, frames)))
    else:
        keep_copy(path, path.parent / "aside")
    if path.exists():
        with path.open("r+b") as handle:
            handle.truncate(offset + sum(map(len, frames[:complete])))
    for k in range(complete, len(labels)):
        append_structures(path, [labels[k]])
        report(k)
    return offset + len(content)


def read_dataset(path: Path) -> list[Atoms]:
    """The labels in a data set, without an unfinished last one; a damaged file is moved aside, to be written anew."""
    try:
        repair_structures(path)
        return read_structures(path, labelled=True) if path.exists() and path.stat().st_size else []
    except DataError:
        move_aside(path, path.parent / "aside")
        return []


# ------------------------------------------------------------------------------------------ MD


def replica_tasks(
    settings: RunSettings, iteration: int, model: Path, starts: Sequence[Path], base: Path = Path()
) -> list[ReplicaTask]:
    """The replicas of an iteration.

    Replica r starts from ``starts[r % len]`` with its own random numbers; lists of temperatures and pressures are dealt
    out in the same way. Ramps count iterations from 0. ``base``: folder that md.colvars is relative to.
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


def ramped(ends: tuple[float, float] | None, length: int, iteration: int, constant: float) -> float:
    """The value of an iteration: linear from ``ends[0]`` in iteration 0 to ``ends[1]`` from ``length`` on."""
    if ends is None:
        return constant
    share = min(iteration / length, 1.0)
    return (1.0 - share) * ends[0] + share * ends[1]


Origin = tuple[int, int]
"""(iteration, replica) of a trajectory"""


def run_replicas(
    tasks: Mapping[Origin, ReplicaTask],
    group: TaskGroup,
    model_keys: Mapping[int, str],
    report: Callable[[ReplicaResult], None],
    progress: Callable[[list[int]], None],
    share: float = 1.0,
) -> dict[Origin, ReplicaResult]:
    """Run replicas in workers; those that an interrupted stage had finished are not run again.

    Args:
        tasks: the replicas of this iteration, and those that earlier ones left running.
        group: where they run, or run already.
        model_keys: of each iteration's model.
        report: called with each result.
        progress: called about once per second with the steps of all replicas so far.
        share: of the replicas to wait for.

    Returns:
        Results of the replicas that have ended, in order. Those that run on are left in the group; those that have not
        begun are taken out of it.

    Raises:
        SimulationError: no replica that has ended has a frame.
        StorageError: the disk is full.
        MachineError: not a single replica came to an end, by a fault of the machine.
    """
    keys = {origin: _task_key(task, model_keys[origin[0]]) for origin, task in tasks.items()}
    results = {
        origin: kept
        for origin, task in tasks.items()
        if origin not in group.running() and (kept := read_finished(task, keys[origin], _finished_file(task)))
    }
    enough = math.ceil(share * len(tasks))
    lost: dict[Origin, UbmdError] = {}

    def done(origin: Origin, result: ReplicaResult | None, error: UbmdError | None) -> None:
        task = tasks[origin]
        result = result or read_finished(task, keys[origin], _finished_file(task))  # else only the answer was lost
        if result is None and isinstance(error, WorkersLost):
            lost[origin] = error
            return
        if result is None:
            check_space(task.frames.parent)
            result = _salvage(task, keys[origin], error)
        results[origin] = result
        report(result)

    def tick() -> None:
        progress([results[o].steps if o in results else steps_so_far(t.frames) or 0 for o, t in tasks.items()])

    missing = {origin: task for origin, task in tasks.items() if origin not in results}
    group.add({origin: (task, keys[origin], _finished_file(task)) for origin, task in missing.items()})
    group.wait(done, tick, lambda: len(results) + len(lost) >= enough)
    group.withdraw()
    if lost:
        check_space(next(iter(tasks.values())).frames.parent)
    if lost and not results:
        raise nothing_ended("replica", next(iter(lost.values())))
    for origin, error in lost.items():  # nothing waits for them: what they have explored counts
        results[origin] = _salvage(tasks[origin], keys[origin], error)
        report(results[origin])
    ordered = {origin: results[origin] for origin in sorted(results)}
    if not any(result.frames for result in ordered.values()):
        reason = next(iter(ordered.values())).reason
        for origin in ordered:  # whoever resumes has mended something, LAMMPS perhaps: try them again then
            _finished_file(tasks[origin]).unlink(missing_ok=True)
        raise SimulationError(f"Every replica failed before its first frame; the first said: {reason}")
    return ordered


def _salvage(task: ReplicaTask, key: str, error: UbmdError | None) -> ReplicaResult:
    """Keep what a failed or lost replica has explored."""
    result = salvage(task, str(error))
    note_replica(task, key, _finished_file(task), result)
    return result


def frames_are_damaged(frames: Path) -> bool:
    """Whether the frames of a finished replica are there, but not as it left them."""
    try:
        kept = read_json(frames.with_name(frames.stem.replace("frames", "replica") + ".json"))
        return frames.exists() and kept["sha256"] != file_hash(frames)
    except (OSError, ValueError, KeyError):
        return frames.exists()


def _finished_file(task: ReplicaTask) -> Path:
    return task.frames.with_name(f"replica_{task.replica:03d}.json")


def settled(task: ReplicaTask) -> dict[str, Any]:
    """All of a task that decides its trajectory, except model and start structure: no paths."""
    # The key of a task without Colvars is what it was before there were any: run folders of then go on.
    absent: set[str] = set() if task.colvars else {"colvars"}
    return task.model_dump(mode="json", exclude={"model", "start", "frames", "trace_every"} | absent)


def _task_key(task: ReplicaTask, model_key: str) -> str:
    """Hash of everything that decides the trajectory; where its files lie does not."""
    starts = read_structures(task.start)
    return content_hash([settled(task), model_key, structures_hash(starts, starts[0].info)])


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
            key = frame.positions.tobytes() + frame.cell[:].tobytes() + state_hash(frame, ()).encode()
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
    info = settings.reference.info
    structures = [_selected_structure(pool[k], iteration, r, info) for k, r in zip(chosen, records, strict=True)]
    return structures, {"pool": len(pool), "wanted": count, "selected": records}


def _selection_record(frame: Atoms, prediction: Prediction) -> dict[str, Any]:
    return {
        "replica": int(frame.info["replica"]),
        "step": int(frame.info["step"]),
        "u": prediction.u,
        "max_u": float(prediction.atomic_u.max()),
    }


def _selected_structure(frame: Atoms, iteration: int, record: dict[str, Any], info: Sequence[str]) -> Atoms:
    copy = bare(frame, info)
    copy.info |= {"iteration": iteration, "replica": record["replica"], "step": record["step"]}
    return copy


# ------------------------------------------------------------------------------------------ errors


def calibration_of(evaluator: Evaluator) -> dict[str, Any]:
    """Conformal factors of energy and force uncertainties (no unit), and the confidence that they reach."""
    energy, forces = (evaluator.metadata["uncertainty"][name] for name in ("energy", "forces"))
    return {
        "energy_factor": energy["scale"],
        "force_factor": forces["scale"],
        "energy_attainable": energy["attainable"],
        "force_attainable": forces["attainable"],
    }
