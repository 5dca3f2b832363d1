"""A network of any back end as the dynamic schedule sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from ase import Atoms

from ubmd.data.labels import dataset_hash
from ubmd.devices import usable
from ubmd.errors import DataError
from ubmd.files import copy_file
from ubmd.potentials.interface import Backend, Labels, Prediction, Signal, TrainingTable
from ubmd.potentials.kinds import backend_of, check_backend, check_training_device
from ubmd.potentials.learner import Judgement, Learner, Progress, _relative, _rms
from ubmd.potentials.record import precision_for
from ubmd.settings.dynamic import ConvergenceSettings, DynamicRunSettings
from ubmd.settings.marks import key_values

if TYPE_CHECKING:  # it needs torch
    from ubmd.potentials.evaluator import NetworkEvaluator


class Network(Learner):
    """A network: warm starts, calibrated atomic uncertainties as errors."""

    files = ("model.pt", "weights.pt")

    @classmethod
    def make(cls, settings: DynamicRunSettings, base: Path, box: Atoms, folder: Path, threads: int) -> Self:
        """See `Learner`."""
        assert settings.model is not None
        backend = backend_of(settings.model, base)
        assert settings.training is not None
        check_training_device(backend, settings.training)
        return cls(settings, backend, threads)

    @classmethod
    def plan(cls, settings: DynamicRunSettings, base: Path, box: Atoms) -> Iterator[str]:
        """See `Learner`."""
        from ubmd.potentials.baseline import check_baseline

        assert settings.model is not None
        check_baseline(settings.model, set(box.symbols))
        assert settings.training is not None
        backend = check_backend(settings.model, settings.uncertainty, base)
        check_training_device(backend, settings.training)
        yield from ()

    def __init__(self, settings: DynamicRunSettings, backend: Backend, threads: int) -> None:
        """``threads``: of the training; part of the result."""
        assert settings.model is not None
        assert settings.training is not None
        self.settings = settings
        self.model = settings.model
        self.backend = backend
        self.files = ("model.pt", backend.checkpoint)
        self.training = settings.training.model_copy(update={"threads": threads})
        self._evaluator: NetworkEvaluator | None = None
        self._known: list[Atoms] = []

    def key(self) -> Any:
        """Network, training and uncertainty."""
        training = key_values(self.training) | {"threads": self.training.threads}
        epochs = self.settings.dynamic.warm_epochs
        return [key_values(self.model), key_values(self.settings.uncertainty), training, epochs, self.settings.seed]

    def learn(
        self, labels: Sequence[Atoms], folder: Path, previous: Path | None, scale: float, progress: Progress
    ) -> dict[str, Any]:
        """Train (from the previous weights if they are there), fit and calibrate the uncertainty, export."""
        from ubmd.potentials.fitting import export_checkpoints
        from ubmd.potentials.members import train_network

        training, validation = split(labels)
        name = self.backend.checkpoint
        warm = previous is not None and (previous / name).exists()
        start = previous / name if previous is not None and warm else None
        epochs = self.settings.dynamic.warm_epochs if warm else self.training.epochs
        trained = train_network(
            self.backend,
            Labels(training, validation),
            TrainingTable(self.model, self.training, epochs),
            folder / "train",
            start,
            self.settings.seed,
            lambda row: progress(dict(row)),
        )
        copy_file(trained, folder / name)
        provenance = {"training_set_hash": dataset_hash(training)}
        uncertainty, path = self.settings.uncertainty, folder / "model.pt"
        metadata = export_checkpoints(
            self.backend,
            [trained],
            self.model,
            training,
            validation,
            uncertainty,
            path,
            provenance,
            device=usable(self.training.device),
        )
        self.load(folder, {}, labels)
        return {"noise": 0.0, "force_scale": metadata["uncertainty"]["forces"]["scale"], "epochs": epochs}

    def load(self, folder: Path, summary: dict[str, Any], labels: Sequence[Atoms]) -> None:
        """The model file."""
        from ubmd.potentials.evaluator import load_network

        model = folder / "model.pt"
        precision = precision_for(model, self.settings.dynamic.precision)
        self._evaluator = load_network(model, precision, usable(self.training.device))
        self._known = split(labels)[0]

    def _predict(self, structures: Sequence[Atoms]) -> list[Prediction]:
        """Predictions, evaluated as `ubmd.calculator.Model` does."""
        import torch

        assert self._evaluator is not None
        with torch.jit.optimized_execution(False):
            return self._evaluator.predict(structures)

    @property
    def noise(self) -> float:
        """Unknown: 0."""
        return 0.0

    def judge(self, labels: Sequence[Atoms]) -> list[Judgement]:
        """Calibrated uncertainty and root mean square error of the worst atoms."""
        found = []
        for atoms, prediction in zip(labels, self._predict(labels), strict=True):
            difference = np.asarray(atoms.get_forces()) - prediction.forces
            worst = float(np.sqrt(np.mean(difference**2, axis=1)).max())
            found.append(Judgement(float(prediction.atomic_u.max()), worst, _rms(difference)))
        return found

    def errors_on(self, labels: Sequence[Atoms]) -> dict[str, Any]:
        """Forces and energies."""
        predictions = self._predict(labels)
        forces = np.concatenate([np.asarray(atoms.get_forces()) for atoms in labels])
        differences = forces - np.concatenate([prediction.forces for prediction in predictions])
        energy = [
            (float(atoms.get_potential_energy()) - prediction.energy) / len(atoms)
            for atoms, prediction in zip(labels, predictions, strict=True)
        ]
        return _relative(differences, forces, len(labels)) | {
            "energy_rmse_mev_per_atom": 1000.0 * _rms(np.array(energy))
        }

    def signals(self, frames: Sequence[Atoms], limits: ConvergenceSettings) -> list[Signal]:
        """None: a network has neither effective parameters nor a noise."""
        return []

    def drops(self, candidates: Sequence[Atoms], frames: Sequence[Atoms]) -> list[float] | None:
        """Not computed."""
        return None

    def choose(self, candidates: Sequence[Atoms], count: int, rng: np.random.Generator) -> list[int]:
        """Largest determinant of the posterior (or largest distance, as the kind of uncertainty has it)."""
        from ubmd.selection import select
        from ubmd.settings import FITTING_METHODS

        predictions = self._predict(candidates)
        known = self._predict(self._known) if self._known else []
        features = np.array([prediction.feature for prediction in predictions])
        uncertainty = self.settings.uncertainty
        chosen = select(
            FITTING_METHODS[uncertainty.kind][0],
            features,
            np.array([prediction.feature for prediction in known]).reshape(-1, features.shape[1]),
            np.array([prediction.u for prediction in predictions]),
            count,
            uncertainty.lambda2,
            0.0,
            0.0,
            rng,
        )
        return [int(k) for k in chosen]


def split(labels: Sequence[Atoms]) -> tuple[list[Atoms], list[Atoms]]:
    """(training, validation): labels 1, 11, 21, ... are for validation, however many labels follow."""
    if len(labels) < 2:
        raise DataError("A network needs at least two labels: one for training, one for validation.")
    validating = [k % 10 == 1 for k in range(len(labels))]
    pairs = list(zip(labels, validating, strict=True))
    return [a for a, v in pairs if not v], [a for a, v in pairs if v]
