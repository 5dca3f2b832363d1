"""The active-learning loop: start -> (train -> export -> measure -> MD -> select -> label -> append) -> ... -> report.

A run is a function of its settings: it is always executed from the beginning, skipping stages whose results are in the
folder. So a killed run continues where it stopped, and ends with the labels of an uninterrupted one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import Executor as StandardExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms

from ubmd.analysis.predictions import labels_of_iteration
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.state import bare, structures_hash
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError, SettingsError
from ubmd.files import content_hash, copy_file, file_hash, move_aside, read_json, write_json
from ubmd.learning.dataset import fresh_sides, split_batch
from ubmd.learning.given import agreement_remark, check_agreement, read_given, set_aside, to_check
from ubmd.learning.labels import label_batch, read_batch, read_postponed, reference_key
from ubmd.learning.loop import new_labels
from ubmd.learning.loop.advice import rare_impulses
from ubmd.learning.loop.models import Models, measure, training_seed
from ubmd.learning.loop.replicas import Replicas, frames_are_damaged, settled, threshold_of
from ubmd.learning.loop.selecting import make_pool, read_frames, select_batch
from ubmd.learning.loop.turn import Turn
from ubmd.learning.loop.verify import input_files, model_to_start_from, state_remarks, verify
from ubmd.learning.reference import look_at_reference, remarks
from ubmd.learning.start import perturb, read_start
from ubmd.learning.walk import START, Walk, drive
from ubmd.learning.work.workers import Executor
from ubmd.measure.confidence import structures_needed
from ubmd.measure.coverage import coverage
from ubmd.measure.torsions import torsions
from ubmd.potentials.kinds import backend_files, backend_of
from ubmd.runs import convergence
from ubmd.runs.folder import Listener, RunFolder
from ubmd.runs.inputs import input_hashes
from ubmd.runs.manifest import open_run
from ubmd.runs.records import IterationEntry
from ubmd.runs.rewind import take_back
from ubmd.runs.seeds import Stage, random_generator
from ubmd.runs.stages import Stages, prepare_folder
from ubmd.settings import RunSettings
from ubmd.settings.marks import key_values
from ubmd.uncertainty.calibration import Outcome


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
            folder ``aside``, and continue from there, if wanted with other settings. Resume it without this argument.

    Raises:
        SettingsError: the settings cannot work, or don't continue the run in the folder.
        LabelError: the reference fails for all start structures, or for several whole batches in a row.
        SimulationError: no replica starts.
        StorageError: the disk is full.
        MachineError: no task could be completed, by a fault of the machine or cluster.
    """
    # Workers may have another working directory.
    folder, base = RunFolder(Path(settings.run_dir).absolute()), Path(base).absolute()
    # Before the folder is made: what is wrong here stays wrong.
    verify(settings, base, here=executor is None)

    def begin(workers: Executor) -> Loop:
        if from_iteration is not None:
            take_back(folder, from_iteration)
        return Loop(settings, base, folder, workers, listener, from_iteration)

    drive(folder, settings.workers, executor, begin)
    return Path(settings.run_dir)


_AT_ONCE = 100  # given labels that are written together; they are in the user's file, too


class Loop(Walk[IterationEntry]):
    """One execution of a run, from its beginning."""

    unit = "iteration"
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
        given = read_given(settings, base)
        self.start_structures = read_start(settings, base, given)
        record = look_at_reference(folder, settings.reference, base, workers, settings.workers.retries)
        inputs = input_hashes(input_files(settings, base), settings.reference.arguments, base)
        own = backend_files(settings.model, base)
        self.plan, changes = open_run(folder, settings, inputs, from_iteration, record, own)
        self.settings = self.plan.at(START)
        self.given, self._refused = set_aside(given, self.settings.reference)
        self._again = to_check(self.given) if self.given and not self.settings.start.trust else []
        backend = backend_of(self.settings.model, base)
        super().__init__(base, folder, workers, listener, self.plan.threads, changes, IterationEntry)
        if record:  # of a run without labels: said once
            starts = self.start_structures
            self._remark([*remarks(record, settings.reference), *state_remarks(starts, settings)])
            self._remark(rare_impulses(starts, settings))
        self._models = Models(backend, base, workers, self.threads, self.events)
        self._model = self._kept_model(settings, base)
        self.newest: list[Atoms] = []  # labels of the last batch
        self._weights: Callable[[], list[Path]] | None = None  # of the last model's networks, made again if lost
        self._keys: dict[int, dict[str, str]] = {}
        self._replicas = Replicas(settings, base, folder, workers, self.events)
        self._torsions: list[np.ndarray] = []

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
            in_use = {origin[0] for origin in self._replicas.left}
            self._models.forget(self.folder, iteration, self.settings.loop.keep_models, in_use)
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
        """The first labels: those that the user has, then perturbed copies of the start structures."""
        if self.given:
            self._take_given()
        if not self.settings.start.count:
            return
        rng = random_generator(self.settings.seed, 0, Stage.START)
        candidates = perturb(self.start_structures, self.settings.start, rng, self.settings.reference.info)
        for k, atoms in enumerate(candidates):
            atoms.info |= {"iteration": START, "replica": k, "step": 0}
        self._label_start(candidates)

    def _take_given(self) -> None:
        """Begin the data set with the user's labels, once the reference agrees with some of them.

        Raises:
            SettingsError: they are not those that the run was started with. DataError, LabelError: see `_label_again`.
        """
        known = [atoms for atoms in self.known if "given" in atoms.info]
        if dataset_hash(known) != dataset_hash(self.given[: len(known)]):
            raise SettingsError(
                f"{self.settings.start.labels} is read in another way than when the run in {self.folder.path} was "
                "started ([labels]): set it back, or set another run_dir."
            )
        if self._again:
            self._label_again([self.given[k] for k in self._again])
        for atoms in (*self.given, *self._refused):
            atoms.info |= {"iteration": START, "step": 0, "given": True}
        self._append(START, self.given, self._refused, at_once=_AT_ONCE)

    def _label_again(self, given: list[Atoms]) -> None:
        """Label some given structures with the reference of the run, and compare.

        Raises:
            DataError: they differ. LabelError: the reference cannot label them.
        """
        reference, folder = self.settings.reference, self.folder.path / "given"
        key = content_hash([dataset_hash(given), structures_hash(given, reference.info), reference_key(reference)])
        candidates, record = [bare(atoms, reference.info) for atoms in given], folder / "agreement.json"
        for k, atoms in enumerate(candidates):
            atoms.info |= {"iteration": START, "replica": k, "step": 0}

        def report(index: int, reason: str) -> None:
            self.events.show("label_done", iteration=START, index=index, why=reason)

        def work() -> None:
            prepare_folder(folder, key)
            retries = self.settings.workers.retries
            label_batch(candidates, folder, reference, self.base, self.workers, report, retries=retries)
            again, rejected = read_batch(folder)
            if rejected or read_postponed(folder):
                reason = rejected[0].info["reason"] if rejected else "lost by a fault of the machine"
                raise LabelError(f"A structure of {self.settings.start.labels} could not be labelled again: {reason}")
            found = check_agreement(given, again, Path(self.settings.start.labels or "").name)
            write_json(record, asdict(found))
            self._remark([agreement_remark(found, len(given), self.settings)])

        once = Stages(self.folder.path, self.events, {self.unit: START})
        once.run("check_labels", key, [record], work)

    # -------------------------------------------------------------------------------------- keys

    def _turn(self, iteration: int) -> Turn:
        """What an iteration starts from, and the keys that follow from it: nothing is computed, nothing is read."""
        settings = self.settings
        context = {"iteration": iteration, "labels": len(self.dataset)}
        once = Stages(self.folder.iteration(iteration), self.events, context)
        training, validation, calibration = self._split(iteration)
        sets = [dataset_hash(training), dataset_hash(validation)]
        options = key_values(settings.training)
        warm = settings.loop.warm_start and (self._weights is not None or self._model is not None)
        before = self.history[-1].labels if self.history else 0
        epochs = settings.epochs(len(self.dataset), len(self.dataset) - before if warm else None)
        train = content_hash(
            [
                sets,
                self._trained_before(iteration) if warm else None,
                key_values(settings.model),
                options | {"threads": self.threads},
                epochs,
                training_seed(settings, iteration),
                settings.uncertainty.networks,
            ]
        )
        calibrating = dataset_hash(calibration) if calibration else None
        uncertainty = key_values(settings.uncertainty)
        earlier = [[k, self._keys[k]["label"]] for k in self._judged_before(iteration)]
        aged = [settings.loop.half_life, earlier] if earlier else []
        model = content_hash([train, sets, calibrating, uncertainty, *aged])
        starts = self._starts(once.folder)
        tasks = self._replicas.tasks(settings, iteration, list(starts), once.folder / "model.pt")
        left = [[origin, self._keys[origin[0]]["md"]] for origin in self._replicas.left]
        where = structures_hash(list(starts.values()), settings.reference.info)
        md = content_hash([model, [settled(task) for task in tasks.values()], where, left])
        selection = key_values(settings.selection)
        select = content_hash([md, sets, selection, settings.uncertainty.lambda2, settings.seed])
        again = [structures_hash(self.postponed, settings.reference.info)] if self.postponed else []
        label = content_hash([select, reference_key(settings.reference), *again])
        keys = {"train": train, "export": model, "md": md, "select": select, "label": label}
        self._keys[iteration] = keys
        # Not in the keys: it follows from the history, and labels of runs that had no such rule stay as they are.
        threshold = threshold_of(self.history, len(self.dataset), settings.loop.threshold)
        tasks = {origin: task.model_copy(update={"threshold": threshold}) for origin, task in tasks.items()}
        return Turn(iteration, settings, once, training, validation, calibration, starts, tasks, keys, epochs)

    def _trained_before(self, iteration: int) -> str | None:
        """Key of what an iteration's training starts from."""
        if iteration > 0:
            return self._keys[iteration - 1]["train"]
        return None if self._model is None else file_hash(self._model)

    def _kept_model(self, settings: RunSettings, base: Path) -> Path | None:
        """The run's own copy of ``start.model``: an earlier run may go on."""
        given = model_to_start_from(settings, base)
        if given is not None and given != self.folder.start_model:
            copy_file(given, self.folder.start_model)
        return None if given is None else self.folder.start_model

    def _training(self, turn: Turn) -> Callable[[], list[Path]]:
        """Makes an iteration's weights when they are needed, from the last ones or from ``start.model``."""
        previous = self._weights
        if previous is None and self._model is not None:
            previous = partial(self._models.starting, turn, self._model)
        return partial(self._models.train, turn, previous)

    def _starts(self, folder: Path) -> dict[Path, Atoms]:
        """Structures that replicas start from, by the file that will hold them."""
        labelled = self.settings.md.start_from == "labelled" and self.newest
        starts = self.newest if labelled else self.start_structures[:1]
        copies = [bare(atoms, self.settings.reference.info) for atoms in starts]
        return {folder / "starts" / f"start_{k:03d}.extxyz": atoms for k, atoms in enumerate(copies)}

    def _pass_over(self, turn: Turn) -> None:
        """Take the results of a settled iteration; its models and frames may be gone."""
        self._weights = self._training(turn)
        damaged = not turn.once.is_done("export", turn.keys["export"])
        if damaged and (turn.once.folder / "model.pt").exists():  # the report may look at it
            self._export(turn)
        for frames in filter(frames_are_damaged, self._replicas.frame_files(turn)):
            move_aside(frames, self.folder.path / "aside")
        self._replicas.read_left(turn)
        self._recall(turn.iteration)
        self._take(turn.iteration, turn.once.folder / "labels")
        if turn.settings.loop.calibrate_on_new and not new_labels.is_judged(turn, self.dataset):
            self._export(turn)
            new_labels.judge(turn, self.dataset)
        self._coverage(self._replicas.frame_files(turn))

    # -------------------------------------------------------------------------------------- one iteration

    def _learn(self, turn: Turn) -> Path:
        """Train, export and measure; returns the model file."""
        self._weights = self._training(turn)
        model = self._export(turn)
        if self._held_out is not None:
            self._held_out.finish()
        test = read_structures(self.folder.test, labelled=True, compare=False) if self.settings.test is not None else []
        measure(turn, model, test)
        copy_file(model, self.folder.model)
        return model

    def _export(self, turn: Turn) -> Path:
        """The model file of an iteration, from its weights."""
        assert self._weights is not None
        return self._models.export(turn, self._weights(), partial(self._outcomes, turn))

    def _judged_before(self, iteration: int) -> range:
        """Earlier iterations whose new labels calibrate the model of this one."""
        return range(iteration if self.settings.loop.calibrate_on_new else 0)

    def _outcomes(self, turn: Turn) -> list[Outcome]:
        """What earlier models said of the labels that they had selected, with weights."""
        found: list[Outcome] = []
        for k in self._judged_before(turn.iteration):
            weight = 0.5 ** ((turn.iteration - 1 - k) / turn.settings.loop.half_life)
            labels = labels_of_iteration(self.dataset, k)
            found += new_labels.outcomes(self.folder.iteration(k), labels, weight)
        return found

    def _split(self, iteration: int) -> tuple[list[Atoms], list[Atoms], list[Atoms]]:
        """(training, validation, calibration): sticky with warm starts, otherwise drawn again, except calibration."""
        sides = [atoms.info["split"] for atoms in self.dataset]
        if not self.settings.loop.warm_start:
            rng = random_generator(self.settings.seed, iteration, Stage.SPLIT, replica=1)
            sides = fresh_sides(sides, self.settings.loop.validation_share, rng)
        pairs = list(zip(self.dataset, sides, strict=True))
        training, validation, calibration = ([a for a, s in pairs if s == side] for side in ("train", "valid", "calib"))
        return training, validation, calibration

    def _explore(self, turn: Turn, model: Path) -> None:
        """MD, selection, labels."""
        self._replicas.run(turn, {iteration: keys["export"] for iteration, keys in self._keys.items()})
        candidates = partial(self._select, turn, model)
        self._label(turn.iteration, turn.keys["label"], candidates, turn.once.folder / "labels", turn.once)
        new_labels.judge(turn, self.dataset)

    def _select(self, turn: Turn, model: Path) -> list[Atoms]:
        """The batch to label next: what this iteration selects, then postponed structures if there is room for them."""
        target, record = turn.once.folder / "selected.extxyz", turn.once.folder / "selected.json"

        def work() -> None:
            # Not in the key: a limit that grows later must not change batches that are already labelled.
            count = min(self.settings.selection.batch, self._affordable())
            pool = make_pool(self._replicas.frame_files(turn))
            chosen, summary = select_batch(pool, turn.training, model, count, self.settings, turn.iteration)
            write_structures(target, chosen)
            write_json(record, summary)

        turn.once.run("select", turn.keys["select"], [target, record], work)
        chosen = read_frames(target)
        return chosen + self._ask_again(turn.iteration, self._affordable() - len(chosen))

    def _accept(self, number: int, labelled: list[Atoms]) -> None:
        """Assign labels to splits."""
        sides = [atoms.info["split"] for atoms in self.dataset]
        loop = self.settings.loop
        rng = random_generator(self.settings.seed, number + 1, Stage.SPLIT)
        judged = sum(map(new_labels.is_chosen, self.dataset))
        enough = loop.calibrate_on_new and judged >= structures_needed(self.settings.uncertainty.alpha)
        new = split_batch(
            sides.count("train"),
            sides.count("valid"),
            len(labelled),
            loop.validation_share,
            rng,
            sides.count("calib"),
            0.0 if enough else loop.calibration_share,
        )
        for atoms, side in zip(labelled, new, strict=True):
            atoms.info["split"] = side
        self.newest = labelled or self.newest

    # -------------------------------------------------------------------------------------- after an iteration

    def _record(self, turn: Turn, verdict: convergence.Verdict | None) -> None:
        """One entry of the history; ``md_steps`` and ``coverage`` count all replicas so far, this iteration's too."""
        iteration, once, explored = turn.iteration, turn.once, verdict is None
        replicas = read_json(once.folder / "replicas.json") if explored else []
        last = self.history[-1] if self.history else None
        entry = {
            "iteration": iteration,
            "labels": once.context["labels"],
            "md_steps": (last.md_steps if last else 0) + sum(result["steps"] for result in replicas),
            **read_json(once.folder / "errors.json"),
            **(new_labels.summaries(once.folder, labels_of_iteration(self.dataset, iteration)) if explored else {}),
            "coverage": self._coverage(self._replicas.frame_files(turn)) if explored else last and last.coverage,
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

    def _why_finished(self, turn: Turn) -> convergence.Verdict | None:
        """The stop rule that holds, if any; it sees the newest model's errors, too."""
        errors = read_json(turn.once.folder / "errors.json")
        newest = IterationEntry.read({"iteration": turn.iteration, "labels": len(self.dataset), **errors})
        calls = self._calls()
        return convergence.stop_rule([*self.history, newest], len(self.dataset), calls, self.settings.loop)

    def _affordable(self) -> int:
        """Structures that may still be labelled."""
        loop, left = self.settings.loop, self.settings.loop.labels - len(self.dataset)
        return left if loop.label_budget is None else min(left, loop.label_budget - self._calls())

    def _calls(self) -> int:
        """Reference calculations for labels so far, those of rejected structures included."""
        given = len(self.given) + len(self._refused)
        return len(self.dataset) + len(self.rejected) - given + len(self._again)

    def _report(self) -> None:
        """Pictures and tables of the run."""
        from ubmd.analysis.report import make_report

        make_report(self.folder.path, run_models=True)  # its own models
