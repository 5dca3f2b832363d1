"""The active-learning loop: start -> (train -> export -> measure -> MD -> select -> label -> append) -> ... -> report.

A run is a function of its settings: it is always walked from the beginning, and stages whose results are in the folder
are passed over. So a killed run continues where it was, and ends with the labels of an uninterrupted one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ubmd.analysis import coverage, torsions
from ubmd.calculator import Evaluator
from ubmd.data.structures import dataset_hash, read_structures, write_structures
from ubmd.errors import LabelError
from ubmd.export import export_model
from ubmd.lammps.replica import ReplicaResult
from ubmd.learning import held_out, stages
from ubmd.learning.run_folder import (
    EventLog,
    Listener,
    RunFolder,
    Stages,
    content_hash,
    copy_file,
    file_hash,
    open_run,
    read_json,
    write_json,
)
from ubmd.learning.stages import Stage, random_generator
from ubmd.learning.workers import Workers
from ubmd.settings import RunSettings
from ubmd.training import load_weights, member_folders, train_members

_LARGEST_FRUITLESS = 3  # iterations in a row without one new label, after which the loop gives up

START = -1
"""Number of the iteration that the first labels belong to, in the info of the data set."""


def run(settings: RunSettings, base: Path | str = ".", listener: Listener | None = None) -> Path:
    """Start or resume the run in ``settings.run_dir``; returns that folder when the loop has ended.

    Args:
        settings: of the run.
        base: folder that start.file, test.file and files of the reference are relative to (the settings file's).
        listener: called with every event, also with those that are too many for events.jsonl (epochs, MD steps).

    Raises:
        SettingsError: the settings cannot work, or don't continue the run in the folder.
        LabelError: the reference fails for all start structures, or for whole batches again and again.
        SimulationError: no replica starts.
    """
    folder = RunFolder(settings.run_dir)
    with folder.locked(), Workers(settings.workers.processes) as workers:
        loop = Loop(settings, Path(base), folder, workers, listener)
        loop.run()
    return folder.path


class Loop:
    """One walk through a run. The folder is locked; the workers live as long as the walk."""

    def __init__(
        self, settings: RunSettings, base: Path, folder: RunFolder, workers: Workers, listener: Listener | None
    ) -> None:
        self.settings = settings
        self.base = base
        self.folder = folder
        self.workers = workers
        self.start_file = base / settings.start.file
        self.start_structures = read_structures(self.start_file)
        manifest = open_run(folder, settings, {"start.file": file_hash(self.start_file)})
        self.events = EventLog(folder.events, listener)
        self.threads = int(manifest["threads"])
        self.dataset: list[Atoms] = []
        self.rejected: list[Atoms] = []
        self.history: list[dict[str, Any]] = []
        self.newest: list[Atoms] = []  # labels of the last batch
        self.weights: list[Path] | None = None  # of the networks of the last model
        self._fruitless = 0
        self._dataset_bytes = 0
        self._torsions: list[np.ndarray] = []

    def run(self) -> None:
        """From the start structures to the report."""
        torch.set_num_threads(self.threads)
        self.events.write("run_started", process=os.getpid(), labels_wanted=self.settings.loop.labels)
        self._make_test_set()
        self._start()
        for iteration in itertools.count():
            folder = self.folder.iteration(iteration)
            once = Stages(folder, self.events, {"iteration": iteration, "labels": len(self.dataset)})
            model = self._learn(iteration, once)
            reason = self._why_finished()
            if not reason:
                self._explore(iteration, model, once)
            self._record(iteration, once, explored=not reason)
            if reason:
                break
        self._report()
        self.events.write("run_done", labels=len(self.dataset), iterations=iteration + 1, reason=reason)

    # -------------------------------------------------------------------------------------- before the loop

    def _make_test_set(self) -> None:
        """The test set comes first, so that every iteration is measured on it."""
        if self.settings.test is not None:
            held_out.provide(
                self.settings.test,
                self.settings.reference,
                self.start_structures[0],
                self.folder,
                self.base,
                self.workers,
                self.events,
            )

    def _start(self) -> None:
        """Perturbed copies of the start structures are the first labels."""
        rng = random_generator(self.settings.seed, 0, Stage.START)
        candidates = stages.perturb(self.start_structures, self.settings.start, rng)
        for k, atoms in enumerate(candidates):
            atoms.info |= {"iteration": START, "replica": k, "step": 0}
        once = Stages(self.folder.path, self.events, {"iteration": START})
        self._label(START, candidates, self.folder.path / "start", once)
        if len(self.dataset) < 2:
            reasons = [atoms.info["reason"] for atoms in self.rejected]
            raise LabelError(
                f"Only {len(self.dataset)} of {len(candidates)} start structures could be labelled, at least 2 are "
                f"needed; the first reason: {reasons[0]}"
            )

    # -------------------------------------------------------------------------------------- one iteration

    def _learn(self, iteration: int, once: Stages) -> Path:
        """Train, export and measure; returns the model file."""
        training, validation = self._split(iteration)
        weights = self._train(iteration, once, training, validation)
        model = once.folder / "model.pt"
        options = self.settings.uncertainty

        def export() -> None:
            provenance = {
                "training_set_hash": dataset_hash(training),
                "settings": self.settings.model_dump(mode="json"),
                "iteration": iteration,
            }
            networks = [load_weights(path) for path in weights]
            export_model(networks, training, validation, options, model, provenance)

        sets = [dataset_hash(training), dataset_hash(validation)]
        once.run("export", [[file_hash(path) for path in weights], sets, options.model_dump()], [model], export)
        self._measure(once, model, training, validation)
        copy_file(model, self.folder.model)
        self.weights = weights
        return model

    def _split(self, iteration: int) -> tuple[list[Atoms], list[Atoms]]:
        """(training, validation): sticky with warm starts, otherwise drawn anew."""
        sides = [atoms.info["split"] for atoms in self.dataset]
        if not self.settings.loop.warm_start:
            rng = random_generator(self.settings.seed, iteration, Stage.SPLIT, replica=1)
            sides = stages.fresh_split(len(self.dataset), self.settings.loop.validation_share, rng)
        pairs = list(zip(self.dataset, sides, strict=True))
        return [a for a, side in pairs if side == "train"], [a for a, side in pairs if side == "valid"]

    def _train(self, iteration: int, once: Stages, training: list[Atoms], validation: list[Atoms]) -> list[Path]:
        """Train from scratch, or from the last weights; returns the new weights, one file per network."""
        settings = self.settings
        count = settings.uncertainty.networks
        initial = self.weights if settings.loop.warm_start else None
        epochs = settings.training.epochs if initial is None else settings.loop.warm_epochs
        options = settings.training.model_copy(update={"threads": self.threads})
        seed = int(random_generator(settings.seed, iteration, Stage.TRAIN).integers(2**31))
        inputs = [
            dataset_hash(training),
            dataset_hash(validation),
            [file_hash(path) for path in initial] if initial else None,
            settings.model.model_dump(mode="json"),
            options.model_dump(mode="json", exclude={"checkpoint_every"}),
            epochs,
            seed,
            count,
        ]
        folder = once.folder / "train"
        weights = [path / "weights.pt" for path in member_folders(folder, count)]

        def work() -> None:
            stages.prepare_folder(folder, content_hash(inputs))
            train_members(
                count,
                settings.model,
                options,
                training,
                validation,
                folder,
                seed,
                initial=initial,
                epochs=epochs,
                progress=lambda row: self.events.show("epoch", iteration=iteration, **row),
            )

        once.run("train", inputs, weights, work)
        return weights

    def _measure(self, once: Stages, model: Path, training: list[Atoms], validation: list[Atoms]) -> None:
        """Errors on training, validation and test set (the last for the report only: nothing depends on it)."""
        test = read_structures(self.folder.test, labelled=True) if self.settings.test is not None else []
        sets = {"train": training, "valid": validation, "test": test}
        target = once.folder / "errors.json"

        def measure() -> None:
            evaluator = Evaluator(model, self.settings.md.precision)
            write_json(target, {name: stages.errors_of(evaluator, atoms) for name, atoms in sets.items() if atoms})

        hashes = [dataset_hash(atoms) for atoms in sets.values()]
        once.run("measure", [file_hash(model), hashes, self.settings.md.precision], [target], measure)

    def _explore(self, iteration: int, model: Path, once: Stages) -> None:
        """MD, selection, labels."""
        self._run_replicas(iteration, model, once)
        candidates = self._select(iteration, model, once)
        before = len(self.dataset)
        self._label(iteration, candidates, once.folder / "labels", once)
        self._check_fruitful(len(self.dataset) - before)

    def _run_replicas(self, iteration: int, model: Path, once: Stages) -> None:
        """Replicas in workers; leaves frames_RRR.extxyz and replicas.json."""
        tasks = stages.replica_tasks(self.settings, iteration, model, self._start_files(once.folder))
        target = once.folder / "replicas.json"
        settled = [task.model_dump(mode="json", exclude={"model", "start", "frames"}) for task in tasks]
        inputs = [settled, file_hash(model), [file_hash(task.start) for task in tasks]]

        def report(result: ReplicaResult) -> None:
            self.events.write("replica_done", iteration=iteration, **result.model_dump())

        def progress(steps: Sequence[int]) -> None:
            self.events.show("md_steps", iteration=iteration, steps=steps, limit=self.settings.md.steps)

        def work() -> None:
            results = stages.run_replicas(tasks, self.settings.md.timeout, self.workers, report, progress)
            write_json(target, [result.model_dump() for result in results])

        once.run("md", inputs, [target, *(task.frames for task in tasks)], work)

    def _start_files(self, folder: Path) -> list[Path]:
        """Files with the structures that replicas start from."""
        labelled = self.settings.md.start_from == "labelled" and self.newest
        starts = self.newest if labelled else self.start_structures[:1]
        files = [folder / "starts" / f"start_{k:03d}.extxyz" for k in range(len(starts))]
        for path, atoms in zip(files, starts, strict=True):
            write_structures(path, [Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)])
        return files

    def _select(self, iteration: int, model: Path, once: Stages) -> list[Atoms]:
        """The batch to label next."""
        target, record = once.folder / "selected.extxyz", once.folder / "selected.json"
        frames = sorted(once.folder.glob("frames_*.extxyz"))
        training, _ = self._split(iteration)
        options = [self.settings.selection.model_dump(), self.settings.uncertainty.lambda2, self.settings.seed]
        inputs = [[file_hash(path) for path in frames], dataset_hash(training), file_hash(model), options]

        def work() -> None:
            # Not among the inputs: a limit that grows later must not change batches that are already labelled.
            count = min(self.settings.selection.batch, self.settings.loop.labels - len(self.dataset))
            pool = stages.make_pool(frames)
            chosen, summary = stages.select_batch(pool, training, model, count, self.settings, iteration)
            write_structures(target, chosen)
            write_json(record, summary)

        once.run("select", inputs, [target, record], work)
        return stages.read_frames(target)

    def _label(self, iteration: int, candidates: list[Atoms], folder: Path, once: Stages) -> None:
        """Label a batch, split it, and append it to the data set."""
        reference = self.settings.reference
        inputs = [dataset_hash(candidates), reference.model_dump(mode="json")]

        def report(index: int, reason: str) -> None:
            self.events.write(
                "label_rejected" if reason else "label_done", iteration=iteration, index=index, why=reason
            )

        def work() -> None:
            stages.prepare_folder(folder, content_hash(inputs))
            stages.label_batch(candidates, folder, reference, self.base, self.workers, report)
            write_json(folder / "done.json", {"candidates": len(candidates)})

        once.run("label", inputs, [folder / "done.json"], work)
        labelled, rejected = stages.read_batch(folder)
        self._append(iteration, labelled, rejected)

    def _append(self, iteration: int, labelled: list[Atoms], rejected: list[Atoms]) -> None:
        """Give labels their ids and sides, and write them behind the data set, one by one."""
        sides = [atoms.info["split"] for atoms in self.dataset]
        share = self.settings.loop.validation_share
        rng = random_generator(self.settings.seed, iteration + 1, Stage.SPLIT)
        new = stages.split_batch(sides.count("train"), sides.count("valid"), len(labelled), share, rng)
        for k, (atoms, side) in enumerate(zip(labelled, new, strict=True)):
            atoms.info |= {"label": len(self.dataset) + k, "split": side}
        self._dataset_bytes = stages.append_once(
            self.folder.dataset,
            self._dataset_bytes,
            labelled,
            lambda k: self.events.write("label_appended", iteration=iteration, label=len(self.dataset) + k),
        )
        self.dataset += labelled
        self.newest = labelled or self.newest
        if rejected:
            self.rejected += rejected
            write_structures(self.folder.rejected, self.rejected)

    # -------------------------------------------------------------------------------------- after an iteration

    def _record(self, iteration: int, once: Stages, explored: bool) -> None:
        """One entry of the history; ``md_steps`` and ``coverage`` count all replicas so far, this iteration's too."""
        replicas = read_json(once.folder / "replicas.json") if explored else []
        last = self.history[-1] if self.history else {"md_steps": 0}
        entry = {
            "iteration": iteration,
            "labels": once.context["labels"],
            "md_steps": last["md_steps"] + sum(result["steps"] for result in replicas),
            **read_json(once.folder / "errors.json"),
            "coverage": self._coverage(once.folder) if explored else last.get("coverage"),
            "max_u": max((result["max_u"] for result in replicas), default=None),
            "replicas": replicas,
            "seconds": once.seconds(),
        }
        self.history.append(entry)
        written = self.folder.read_history()
        if len(self.history) >= len(written):
            write_json(self.folder.history, self.history)
        if written[iteration : iteration + 1] != [entry]:
            shown = {
                key: entry[key] for key in ("labels", "md_steps", "train", "valid", "test", "coverage") if key in entry
            }
            self.events.write("iteration_done", iteration=iteration, **shown)

    def _coverage(self, folder: Path) -> float | None:
        """Share of the square of the first two torsions that all frames so far have visited."""
        indices = list(self.settings.variables.torsions.values())[:2]
        if len(indices) < 2:
            return None
        frames = [frame for path in sorted(folder.glob("frames_*.extxyz")) for frame in stages.read_frames(path)]
        self._torsions.append(torsions(frames, indices))
        return float(coverage(np.concatenate(self._torsions)))

    def _why_finished(self) -> str:
        """The stop rule that holds, or an empty text."""
        loop = self.settings.loop
        if len(self.dataset) >= loop.labels:
            return f"The data set has {len(self.dataset)} labels (loop.labels = {loop.labels})."
        last = self.history[-loop.quiet_iterations :]
        quiet = all(r["stopped"] == "step limit" for entry in last for r in entry["replicas"])
        if loop.stop_when_quiet and len(last) == loop.quiet_iterations and quiet:
            return f"Every replica reached the step limit in {loop.quiet_iterations} successive iterations."
        return ""

    def _check_fruitful(self, new: int) -> None:
        """Give up after several iterations in a row without a label: more of the same would never end."""
        self._fruitless = 0 if new else self._fruitless + 1
        if self._fruitless == _LARGEST_FRUITLESS:
            last = self.rejected[-1].info["reason"] if self.rejected else "no frame differed from the training set"
            raise LabelError(f"{_LARGEST_FRUITLESS} iterations in a row gave no label; the last reason: {last}")

    def _report(self) -> None:
        """Pictures and tables of the run."""
        from ubmd.analysis import make_report

        make_report(self.folder.path)
