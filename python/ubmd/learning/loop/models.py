"""The model of an iteration: networks are trained, the uncertainty is fitted and calibrated, errors are measured."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.analysis import predictions
from ubmd.calculator import Model
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.devices import usable
from ubmd.errors import ModelError, TrainingError, UbmdError
from ubmd.files import content_hash, file_hash, is_sealed, move_aside, write_json
from ubmd.learning.loop.turn import Turn
from ubmd.learning.work.groups import note_losses, nothing_ended, run_tasks
from ubmd.learning.work.tasks import train_member
from ubmd.learning.work.workers import Executor, TaskFailed, WorkersLost
from ubmd.measure.confidence import shortfall
from ubmd.measure.errors import calibration_of, error_summary
from ubmd.potentials.fitting import export_checkpoints
from ubmd.potentials.interface import Backend, Labels, TrainingTable
from ubmd.potentials.members import member_folders, member_seed, train_networks
from ubmd.potentials.record import precision_for
from ubmd.potentials.starting import constants_told, start_from
from ubmd.runs.folder import EventLog, RunFolder
from ubmd.runs.seeds import Stage, random_generator
from ubmd.runs.stages import prepare_folder
from ubmd.settings import RunSettings
from ubmd.uncertainty.calibration import Outcome


@dataclass(frozen=True)
class Models:
    """Makes the models of iterations."""

    backend: Backend
    base: Path
    """folder of the settings file"""
    workers: Executor
    threads: int
    events: EventLog

    def train(self, turn: Turn, previous: Callable[[], list[Path]] | None) -> list[Path]:
        """Train from scratch, or from the weights that ``previous`` provides; returns the new ones, one per network."""
        settings = turn.settings
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

    def starting(self, turn: Turn, source: Path) -> list[Path]:
        """Weights out of an earlier model for the first training, with constants that fit its labels."""
        settings = turn.settings
        count, folder = settings.uncertainty.networks, turn.once.folder / "initial"
        paths, constants = start_from(source, self.backend, count, settings.model, turn.training, folder)
        told = constants_told(constants)
        if told:
            self.events.write("remark", text=told)
        return paths

    def _train_networks(self, turn: Turn, folder: Path, initial: list[Path] | None, key: str) -> None:
        """Train what the folder lacks: here, or the members of an ensemble side by side in workers."""
        settings = turn.settings
        count, seed = settings.uncertainty.networks, training_seed(settings, turn.iteration)
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

    def export(self, turn: Turn, weights: list[Path], earlier: Callable[[], Sequence[Outcome]] = lambda: ()) -> Path:
        """Fit and calibrate the uncertainty, write the model file.

        ``earlier``: what earlier models said of the labels that they had selected.
        """
        model = turn.once.folder / "model.pt"

        def export() -> None:
            provenance = {
                "training_set_hash": dataset_hash(turn.training),
                "settings": turn.settings.model_dump(mode="json", exclude={"run_dir", "workers"}),
                "iteration": turn.iteration,
            }
            calibration = turn.calibration or turn.validation
            uncertainty = turn.settings.uncertainty
            network = turn.settings.model
            record = export_checkpoints(
                self.backend,
                weights,
                network,
                turn.training,
                calibration,
                uncertainty,
                model,
                provenance,
                earlier(),
                usable(turn.settings.training.device),
            )["uncertainty"]
            attained = [record[name]["attainable"] for name in ("energy", "forces")]
            sentence = shortfall(attained[0], attained[1], uncertainty.alpha)
            if sentence and turn.iteration == 0:  # said once; `ubmd status` says it of the newest model
                self.events.write("remark", text=sentence)

        turn.once.run("export", turn.keys["export"], [model], export)
        return model

    def forget(self, folder: RunFolder, newest: int, keep: int | None, in_use: Container[int]) -> None:
        """Delete model files and weights of all but the ``keep`` newest iterations; logs and errors stay.

        A run that needs deleted weights again, as one that is taken back does, trains them again.

        Args:
            folder: of the run.
            newest: iteration.
            keep: None for all.
            in_use: iterations whose replicas are still running.
        """
        for iteration in range(newest - keep + 1 if keep is not None else 0):
            path = folder.iteration(iteration)
            trained = {*path.glob(f"train/**/{self.backend.checkpoint}"), *path.glob("train/**/checkpoint.pt")}
            trained |= {*path.glob("train/**/module.pt")}  # of a network of another program
            for file in {path / "model.pt", *trained} if iteration not in in_use else ():
                file.unlink(missing_ok=True)


def training_seed(settings: RunSettings, iteration: int) -> int:
    """Seed of an iteration's training."""
    return int(random_generator(settings.seed, iteration, Stage.TRAIN).integers(2**31))


def evaluator_of(model: Path, settings: RunSettings) -> Model:
    """A model file in the precision of MD, on the device of the training if torch has it here."""
    return Model(model, precision_for(model, settings.md.precision), usable(settings.training.device))


def measure(turn: Turn, model: Path, test: list[Atoms]) -> None:
    """Errors on training, held-out and test labels (the last for the report only: nothing depends on it)."""
    sets = {"train": turn.training, "valid": turn.validation, "calib": turn.calibration, "test": test}
    target, kept = turn.once.folder / "errors.json", turn.once.folder / predictions.FILE

    def work() -> None:
        evaluator = evaluator_of(model, turn.settings)
        found = {name: evaluator.predict(atoms) for name, atoms in sets.items() if atoms}
        errors = {name: error_summary(sets[name], each) for name, each in found.items()}
        if test:
            predictions.keep_predictions(kept, test, found["test"], evaluator.metadata)
        write_json(target, errors | {"calibration": calibration_of(evaluator)})

    key = content_hash(
        [turn.keys["export"], [dataset_hash(atoms) for atoms in sets.values()], turn.settings.md.precision]
    )
    turn.once.run("measure", key, [target, kept] if test else [target], work)
