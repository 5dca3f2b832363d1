"""The active-learning loop: start -> (train -> export -> measure -> MD -> select -> label -> append) -> ... -> report.

A run is a function of its settings: it is always walked from the beginning, and stages whose results are in the folder
are passed over. So a killed run continues where it was, and ends with the labels of an uninterrupted one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor as StandardExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ubmd.analysis import predictions
from ubmd.calculator import Evaluator
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.state import bare, structures_hash
from ubmd.data.structures import read_structures
from ubmd.errors import ModelError, TrainingError, UbmdError
from ubmd.files import content_hash, copy_file, file_hash, is_sealed, move_aside, read_json, write_json
from ubmd.lammps.engine import ReplicaResult, ReplicaTask
from ubmd.learning.dataset import fresh_sides, split_batch
from ubmd.learning.labels import reference_key
from ubmd.learning.loop.replicas import Origin, frames_are_damaged, replica_tasks, run_replicas, settled
from ubmd.learning.loop.selecting import make_pool, read_frames, select_batch
from ubmd.learning.loop.verify import input_files, state_remarks, verify
from ubmd.learning.reference import look_at_reference, remarks
from ubmd.learning.start import perturb
from ubmd.learning.walk import START, Walk, drive
from ubmd.learning.work.groups import TaskGroup, note_losses, nothing_ended, run_tasks
from ubmd.learning.work.tasks import run_md, train_member
from ubmd.learning.work.workers import Executor, TaskFailed, WorkersLost
from ubmd.measure import convergence
from ubmd.measure.coverage import coverage
from ubmd.measure.errors import calibration_of, error_summary
from ubmd.measure.torsions import torsions
from ubmd.potentials.fitting import export_checkpoints
from ubmd.potentials.interface import Labels, TrainingTable
from ubmd.potentials.kinds import backend_of
from ubmd.potentials.members import member_folders, member_seed, train_networks
from ubmd.runs.folder import Listener, RunFolder
from ubmd.runs.inputs import input_hashes
from ubmd.runs.manifest import open_run
from ubmd.runs.records import IterationEntry
from ubmd.runs.rewind import take_back
from ubmd.runs.seeds import Stage, random_generator
from ubmd.runs.stages import Stages, prepare_folder
from ubmd.settings import RunSettings
from ubmd.settings.marks import key_values


def run(
    settings: RunSettings,
    base: Path | str = ".",
    listener: Listener | None = None,
    executor: StandardExecutor | None = None,
    from_iteration: int | None = None,
) -> Path:
    """Start or resume the run in ``settings.run_dir``; returns that folder when the loop has ended.

    Args:
        settings: of the run.
        base: folder that start.file, test.file and files of the reference are relative to (the settings file's).
        listener: called with every event, also with those that are too many for events.jsonl (epochs, MD steps).
        executor: where tasks run, any ``concurrent.futures.Executor``; None: as ``settings.workers`` says.
        from_iteration: take the run back: keep the labels from before this iteration, move everything later into the
            folder ``aside``, and go on from there, if wanted with other settings. Resume it without this argument.

    Raises:
        SettingsError: the settings cannot work, or don't continue the run in the folder.
        LabelError: the reference fails for all start structures, or for whole batches again and again.
        SimulationError: no replica starts.
        StorageError: the disk is full.
        MachineError: no task comes to an end, by a fault of the machine or cluster.
    """
    # Workers may have another working directory.
    folder, base = RunFolder(Path(settings.run_dir).absolute()), Path(base).absolute()
    # Before the folder is made: what is wrong here stays wrong.
    verify(settings, base)

    def begin(workers: Executor) -> Loop:
        if from_iteration is not None:
            take_back(folder, from_iteration)
        return Loop(settings, base, folder, workers, listener, from_iteration)

    drive(folder, settings.workers, executor, begin)
    return Path(settings.run_dir)


@dataclass
class _Turn:
    """One iteration: where it works, and the keys of its stages."""

    iteration: int
    once: Stages
    training: list[Atoms]
    validation: list[Atoms]
    calibration: list[Atoms]
    """labels that only calibrate; empty: the validation does"""
    starts: dict[Path, Atoms]
    """file -> structure that replicas start from"""
    tasks: dict[Origin, ReplicaTask]
    keys: dict[str, str]
    epochs: int
    """of the training"""


class Loop(Walk):
    """One walk through a run."""

    unit = "iteration"
    entry = IterationEntry
    settings: RunSettings

    def __init__(
        self,
        settings: RunSettings,
        base: Path,
        folder: RunFolder,
        workers: Executor,
        listener: Listener | None,
        from_iteration: int | None = None,
    ) -> None:
        self.start_structures = read_structures(base / settings.start.file, settings.start.labels)
        record = look_at_reference(folder, settings.reference, base, workers, settings.workers.retries)
        inputs = input_hashes(input_files(settings, base), settings.reference.arguments, base)
        self.plan, changes = open_run(folder, settings, inputs, from_iteration, record)
        self.settings = self.plan.at(START)
        self.backend = backend_of(self.settings.model, base)
        super().__init__(base, folder, workers, listener, self.plan.threads, changes)
        if record:  # of a run without labels: said once
            self._remark([*remarks(record, settings.reference), *state_remarks(self.start_structures, settings)])
        self.newest: list[Atoms] = []  # labels of the last batch
        self._weights: Callable[[], list[Path]] | None = None  # of the last model's networks, made again if lost
        self._keys: dict[int, dict[str, str]] = {}
        self._left: dict[Origin, ReplicaTask] = {}  # replicas of earlier iterations that run on
        self._replicas = TaskGroup(
            workers,
            run_md,
            settings.md.timeout,
            settings.workers.retries,
            self._replicas_at_once(settings),
            lambda origin, *loss: note_losses(self.events, "replica", iteration=origin[0])(origin, *loss),
        )
        self._torsions: list[np.ndarray] = []

    def _replicas_at_once(self, settings: RunSettings) -> int | None:
        """Replicas of several ranks take several workers' cores; an asynchronous loop keeps one worker for labels."""
        if settings.md.ranks == 1 and not settings.loop.asynchronous:
            return None  # the executor queues them
        free = self.workers.processes - (1 if settings.loop.asynchronous else 0)
        return max(1, free // settings.md.ranks)

    def run(self) -> None:
        """From the start structures to the report."""
        labels = self.plan.phases[-1][1].loop.labels
        self.events.write("run_started", process=os.getpid(), labels_wanted=labels)
        self._start()
        self._begin_test_set(self.start_structures[0])
        for iteration in itertools.count():
            self.settings = self.plan.at(iteration)
            turn = self._turn(iteration)
            if self._is_settled(turn.iteration, turn.once, ("record", "label"), turn.keys["label"]):
                self._pass_over(turn)
                continue
            model = self._learn(turn)
            verdict = self._why_finished(turn)
            if verdict is None:
                self._explore(turn, model)
            self._record(turn, verdict)
            if verdict is not None:
                self._end(iteration, verdict)
                return

    def _end(self, iteration: int, verdict: convergence.Verdict) -> None:
        """The report, and why the run has ended."""
        if self.postponed:
            many = f"{len(self.postponed)} structures were" if len(self.postponed) > 1 else "One structure was"
            self._remark(
                [f"{many} lost by a fault of the machine and not labelled; with more labels, the run asks again."]
            )
        self._report()
        ending = {"reason": verdict.reason, "rule": verdict.rule, "evidence": verdict.evidence}
        self.events.write("run_done", labels=len(self.dataset), iterations=iteration + 1, **ending)

    # -------------------------------------------------------------------------------------- before the loop

    def _start(self) -> None:
        """Perturbed copies of the start structures are the first labels."""
        rng = random_generator(self.settings.seed, 0, Stage.START)
        candidates = perturb(self.start_structures, self.settings.start, rng, self.settings.reference.info)
        for k, atoms in enumerate(candidates):
            atoms.info |= {"iteration": START, "replica": k, "step": 0}
        self._label_start(candidates)

    # -------------------------------------------------------------------------------------- keys

    def _turn(self, iteration: int) -> _Turn:
        """What an iteration starts from, and the keys that follow from it: nothing is computed, nothing is read."""
        settings = self.settings
        context = {"iteration": iteration, "labels": len(self.dataset)}
        once = Stages(self.folder.iteration(iteration), self.events, context)
        training, validation, calibration = self._split(iteration)
        sets = [dataset_hash(training), dataset_hash(validation)]
        options = key_values(settings.training)
        warm = settings.loop.warm_start and self._weights is not None
        epochs = settings.epochs(len(self.dataset), len(self.dataset) - self.history[-1]["labels"] if warm else None)
        train = content_hash(
            [
                sets,
                self._keys[iteration - 1]["train"] if warm else None,
                key_values(settings.model),
                options | {"threads": self.threads},
                epochs,
                self._training_seed(iteration),
                settings.uncertainty.networks,
            ]
        )
        calibrating = dataset_hash(calibration) if calibration else None
        model = content_hash([train, sets, calibrating, key_values(settings.uncertainty)])
        starts = self._starts(once.folder)
        tasks = self._tasks(iteration, list(starts), once.folder / "model.pt")
        left = [[origin, self._keys[origin[0]]["md"]] for origin in self._left]
        where = structures_hash(list(starts.values()), settings.reference.info)
        md = content_hash([model, [settled(task) for task in tasks.values()], where, left])
        selection = key_values(settings.selection)
        select = content_hash([md, sets, selection, settings.uncertainty.lambda2, settings.seed])
        again = [structures_hash(self.postponed, settings.reference.info)] if self.postponed else []
        label = content_hash([select, reference_key(settings.reference), *again])
        keys = {"train": train, "export": model, "md": md, "select": select, "label": label}
        self._keys[iteration] = keys
        return _Turn(iteration, once, training, validation, calibration, starts, tasks, keys, epochs)

    def _training_seed(self, iteration: int) -> int:
        return int(random_generator(self.settings.seed, iteration, Stage.TRAIN).integers(2**31))

    def _starts(self, folder: Path) -> dict[Path, Atoms]:
        """Structures that replicas start from, by the file that will hold them."""
        labelled = self.settings.md.start_from == "labelled" and self.newest
        starts = self.newest if labelled else self.start_structures[:1]
        copies = [bare(atoms, self.settings.reference.info) for atoms in starts]
        return {folder / "starts" / f"start_{k:03d}.extxyz": atoms for k, atoms in enumerate(copies)}

    def _tasks(self, iteration: int, files: list[Path], model: Path) -> dict[Origin, ReplicaTask]:
        """New replicas: those whose earlier ones don't run on."""
        tasks = replica_tasks(self.settings, iteration, model, files, self.base)
        busy = {replica for _, replica in self._left}
        return {(iteration, task.replica): task for task in tasks if task.replica not in busy}

    def _pass_over(self, turn: _Turn) -> None:
        """Take the results of a settled iteration; its models and frames may be gone."""
        self._weights = partial(self._train, turn, self._weights)
        damaged = not turn.once.is_done("export", turn.keys["export"])
        if damaged and (turn.once.folder / "model.pt").exists():  # the report may look at it
            self._export(turn, self._weights())
        for frames in filter(frames_are_damaged, self._frame_files(turn)):
            move_aside(frames, self.folder.path / "aside")
        self._left = self._read_left(turn)
        self.history.append(self.folder.read_history()[turn.iteration])
        self._take(turn.iteration, turn.once.folder / "labels")
        self._coverage(self._frame_files(turn))

    # -------------------------------------------------------------------------------------- one iteration

    def _learn(self, turn: _Turn) -> Path:
        """Train, export and measure; returns the model file."""
        self._weights = partial(self._train, turn, self._weights)
        weights = self._weights()
        model = self._export(turn, weights)
        self._measure(turn, model)
        copy_file(model, self.folder.model)
        return model

    def _export(self, turn: _Turn, weights: list[Path]) -> Path:
        """Fit and calibrate the uncertainty, write the model file."""
        model = turn.once.folder / "model.pt"

        def export() -> None:
            provenance = {
                "training_set_hash": dataset_hash(turn.training),
                "settings": self.settings.model_dump(mode="json", exclude={"run_dir", "workers"}),
                "iteration": turn.iteration,
            }
            calibration = turn.calibration or turn.validation
            uncertainty = self.settings.uncertainty
            export_checkpoints(self.backend, weights, turn.training, calibration, uncertainty, model, provenance)

        turn.once.run("export", turn.keys["export"], [model], export)
        return model

    def _split(self, iteration: int) -> tuple[list[Atoms], list[Atoms], list[Atoms]]:
        """(training, validation, calibration): sticky with warm starts, otherwise drawn anew, except calibration."""
        sides = [atoms.info["split"] for atoms in self.dataset]
        if not self.settings.loop.warm_start:
            rng = random_generator(self.settings.seed, iteration, Stage.SPLIT, replica=1)
            sides = fresh_sides(sides, self.settings.loop.validation_share, rng)
        pairs = list(zip(self.dataset, sides, strict=True))
        training, validation, calibration = ([a for a, s in pairs if s == side] for side in ("train", "valid", "calib"))
        return training, validation, calibration

    def _train(self, turn: _Turn, previous: Callable[[], list[Path]] | None) -> list[Path]:
        """Train from scratch, or from the weights that ``previous`` provides; returns the new ones, one per network."""
        settings = self.plan.at(turn.iteration)
        count, folder = settings.uncertainty.networks, turn.once.folder / "train"
        weights = [path / self.backend.checkpoint for path in member_folders(folder, count)]

        def work() -> None:
            initial = previous() if previous is not None and settings.loop.warm_start else None
            # If earlier weights had to be made again, a checkpoint that began from the lost ones may not fit.
            key = content_hash([turn.keys["train"], [file_hash(path) for path in initial or []]])
            prepare_folder(folder, key)
            try:
                self._train_networks(turn, folder, initial, key)
            except ModelError:  # a damaged checkpoint
                move_aside(folder, folder.parent / "aside")
                prepare_folder(folder, key)
                self._train_networks(turn, folder, initial, key)

        turn.once.run("train", turn.keys["train"], weights, work)
        return weights

    def _train_networks(self, turn: _Turn, folder: Path, initial: list[Path] | None, key: str) -> None:
        """Train what the folder lacks: here, or the members of an ensemble side by side in workers."""
        settings = self.plan.at(turn.iteration)
        count, seed = settings.uncertainty.networks, self._training_seed(turn.iteration)
        options = settings.training.model_copy(update={"threads": self.threads})
        at_once = min(count, self.workers.processes // self.threads)

        def show(row: dict[str, Any]) -> None:
            self.events.show("epoch", iteration=turn.iteration, **row)

        if at_once < 2:
            sets = turn.training, turn.validation
            table = TrainingTable(settings.model, options, turn.epochs)
            train_networks(self.backend, count, table, Labels(*sets), folder, seed, initial, show)
            return
        files = folder / "training.extxyz", folder / "validation.extxyz"
        for path, structures in zip(files, (turn.training, turn.validation), strict=True):
            write_structures(path, structures)
        folders = member_folders(folder, count)
        starts: Sequence[Path | None] = initial or [None] * count
        tasks = {
            m: (*files, where, key, settings.model, options, member_seed(seed, m), starts[m], turn.epochs, self.base)
            for m, where in enumerate(folders)
            if not is_sealed(where / self.backend.checkpoint, key)
        }

        def done(_: int, __: None, error: UbmdError | None) -> None:
            if isinstance(error, WorkersLost):
                raise nothing_ended("training", error)
            if error is not None:
                raise TrainingError(f"A training failed: {error}") if isinstance(error, TaskFailed) else error

        def tick() -> None:
            logs = [where / "log.csv" for where in folders]
            finished = sum(len(log.read_text().splitlines()) - 1 for log in logs if log.exists())
            show({"epoch": finished, "epochs": count * turn.epochs})

        lost = note_losses(self.events, "training", iteration=turn.iteration)
        run_tasks(self.workers, train_member, tasks, None, done, tick, settings.workers.retries, at_once, lost)

    def _measure(self, turn: _Turn, model: Path) -> None:
        """Errors on training, held-out and test labels (the last for the report only: nothing depends on it)."""
        if self._held_out is not None:
            self._held_out.finish()
        test = read_structures(self.folder.test, labelled=True, compare=False) if self.settings.test is not None else []
        sets = {"train": turn.training, "valid": turn.validation, "calib": turn.calibration, "test": test}
        target, kept = turn.once.folder / "errors.json", turn.once.folder / predictions.FILE
        precision = self.settings.md.precision

        def measure() -> None:
            evaluator = Evaluator(model, precision)
            found = {name: evaluator.predict(atoms) for name, atoms in sets.items() if atoms}
            errors = {name: error_summary(sets[name], each) for name, each in found.items()}
            if test:
                predictions.keep_predictions(kept, test, found["test"], evaluator.metadata["uncertainty"])
            write_json(target, errors | {"calibration": calibration_of(evaluator)})

        key = content_hash([turn.keys["export"], [dataset_hash(atoms) for atoms in sets.values()], precision])
        turn.once.run("measure", key, [target, kept] if test else [target], measure)

    def _explore(self, turn: _Turn, model: Path) -> None:
        """MD, selection, labels."""
        self._run_replicas(turn)
        candidates = partial(self._select, turn, model)
        self._label(turn.iteration, turn.keys["label"], candidates, turn.once.folder / "labels", turn.once)
        self._keep_predictions(turn)

    def _keep_predictions(self, turn: _Turn) -> None:
        """What this iteration's model says about the labels that it has selected: the report's stand-in for a test."""
        labels = predictions.labels_of_iteration(self.dataset, turn.iteration)
        if labels and self.settings.test is None:
            evaluator = Evaluator(turn.once.folder / "model.pt", self.settings.md.precision)
            promise = evaluator.metadata["uncertainty"]
            predictions.keep_predictions(
                turn.once.folder / predictions.FILE, labels, evaluator.predict(labels), promise
            )

    def _run_replicas(self, turn: _Turn) -> None:
        """Replicas in workers; leaves frames_RRR.extxyz, replicas.json, and left.json with those that run on."""
        tasks = self._left | turn.tasks
        target, left = turn.once.folder / "replicas.json", turn.once.folder / "left.json"
        for path, atoms in turn.starts.items():
            write_structures(path, [atoms])
        loop = self.settings.loop

        def report(result: ReplicaResult) -> None:
            self.events.write("replica_done", iteration=turn.iteration, **result.model_dump())

        def progress(steps: Sequence[int]) -> None:
            self.events.show("md_steps", iteration=turn.iteration, steps=steps, limit=self.settings.md.steps)

        def work() -> None:
            model_keys = {iteration: keys["export"] for iteration, keys in self._keys.items()}
            share = loop.asynchronous_share if loop.asynchronous else 1.0
            results = run_replicas(tasks, self._replicas, model_keys, report, progress, share)
            running = self._replicas.running()
            write_json(left, sorted(origin for origin in tasks if origin in running - set(results)))
            own = {origin: result.model_dump() for origin, result in results.items()}
            write_json(
                target,
                [r if o[0] == turn.iteration else {"iteration": o[0], **r} for o, r in own.items()],
            )

        turn.once.run("md", turn.keys["md"], lambda: [target, left, *self._frame_files(turn)], work)
        self._left = self._read_left(turn)

    def _read_left(self, turn: _Turn) -> dict[Origin, ReplicaTask]:
        """Tasks of the replicas that ran on when this iteration selected its batch."""
        path = turn.once.folder / "left.json"
        tasks = self._left | turn.tasks
        return {tuple(origin): tasks[tuple(origin)] for origin in read_json(path)} if path.exists() else {}

    def _frame_files(self, turn: _Turn) -> list[Path]:
        """Frames of the replicas that ended in this iteration, in the order of their (iteration, replica)."""
        path = turn.once.folder / "replicas.json"
        results = read_json(path) if path.exists() else []
        folders = [self.folder.iteration(result.get("iteration", turn.iteration)) for result in results]
        return [f / f"frames_{r['replica']:03d}.extxyz" for f, r in zip(folders, results, strict=True)]

    def _select(self, turn: _Turn, model: Path) -> list[Atoms]:
        """The batch to label next: what this iteration selects, then postponed structures if there is room for them."""
        target, record = turn.once.folder / "selected.extxyz", turn.once.folder / "selected.json"

        def work() -> None:
            # Not in the key: a limit that grows later must not change batches that are already labelled.
            count = min(self.settings.selection.batch, self._affordable())
            pool = make_pool(self._frame_files(turn))
            chosen, summary = select_batch(pool, turn.training, model, count, self.settings, turn.iteration)
            write_structures(target, chosen)
            write_json(record, summary)

        turn.once.run("select", turn.keys["select"], [target, record], work)
        chosen = read_frames(target)
        return chosen + self._ask_again(turn.iteration, self._affordable() - len(chosen))

    def _accept(self, number: int, labelled: list[Atoms]) -> None:
        """Give labels their sides."""
        sides = [atoms.info["split"] for atoms in self.dataset]
        loop = self.settings.loop
        rng = random_generator(self.settings.seed, number + 1, Stage.SPLIT)
        new = split_batch(
            sides.count("train"),
            sides.count("valid"),
            len(labelled),
            loop.validation_share,
            rng,
            sides.count("calib"),
            loop.calibration_share,
        )
        for atoms, side in zip(labelled, new, strict=True):
            atoms.info["split"] = side
        self.newest = labelled or self.newest

    # -------------------------------------------------------------------------------------- after an iteration

    def _record(self, turn: _Turn, verdict: convergence.Verdict | None) -> None:
        """One entry of the history; ``md_steps`` and ``coverage`` count all replicas so far, this iteration's too."""
        iteration, once, explored = turn.iteration, turn.once, verdict is None
        replicas = read_json(once.folder / "replicas.json") if explored else []
        last = self.history[-1] if self.history else {"md_steps": 0}
        entry = {
            "iteration": iteration,
            "labels": once.context["labels"],
            "md_steps": last["md_steps"] + sum(result["steps"] for result in replicas),
            **read_json(once.folder / "errors.json"),
            "coverage": self._coverage(self._frame_files(turn)) if explored else last.get("coverage"),
            "max_u": max((result["max_u"] for result in replicas), default=None),
            "replicas": replicas,
            "seconds": once.seconds(),
        }
        if verdict is not None:
            entry["ended"] = verdict.as_json()
        if self._add_to_history(iteration, entry):
            shown = {
                key: entry[key] for key in ("labels", "md_steps", "train", "valid", "test", "coverage") if key in entry
            }
            self.events.write("iteration_done", iteration=iteration, **shown)
        if explored:
            once.note("record", turn.keys["label"])

    def _coverage(self, files: list[Path]) -> float | None:
        """Share of the square of the first two torsions that all frames so far have visited."""
        indices = list(self.settings.variables.torsions.values())[:2]
        if len(indices) < 2:
            return None
        frames = [frame for path in files if path.exists() for frame in read_frames(path)]
        if frames:
            self._torsions.append(torsions(frames, indices))
        if not self._torsions:
            return None
        return float(coverage(np.concatenate(self._torsions)))

    def _why_finished(self, turn: _Turn) -> convergence.Verdict | None:
        """The stop rule that holds, if any; it sees the newest model's errors, too."""
        errors = read_json(turn.once.folder / "errors.json")
        newest = {"iteration": turn.iteration, "labels": len(self.dataset), **errors}
        calls = len(self.dataset) + len(self.rejected)
        return convergence.stop_rule([*self.history, newest], len(self.dataset), calls, self.settings.loop)

    def _affordable(self) -> int:
        """Structures that may still be labelled."""
        loop, left = self.settings.loop, self.settings.loop.labels - len(self.dataset)
        return (
            left if loop.label_budget is None else min(left, loop.label_budget - len(self.dataset) - len(self.rejected))
        )

    def _report(self) -> None:
        """Pictures and tables of the run."""
        from ubmd.analysis.report import make_report

        make_report(self.folder.path, run_models=True)  # its own models
