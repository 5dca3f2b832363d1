"""What a dynamic run trains: force constants, or a network. The engine knows only `Learner`."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.data.structures import dataset_hash
from ubmd.errors import DataError
from ubmd.files import copy_file
from ubmd.potentials.force_constants.convergence import Signal
from ubmd.settings import CrystalSettings
from ubmd.settings.dynamic import ConvergenceSettings, DynamicRunSettings

Array = NDArray[np.float64]
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Judgement:
    """A model on one labelled structure, eV/Å."""

    error: float
    """predicted: the largest of a force component (force constants) or of an atom (networks)"""
    true: float
    """largest |ΔF|, of a component or (networks) the root mean square over an atom's components"""
    rms: float
    """root mean square ΔF of all components"""


class Learner(ABC):
    """A kind of model that learns labels and predicts its own force error."""

    lattice = False
    """whether the model is one of a crystal"""
    files: tuple[str, ...] = ("model.pt",)
    """what `learn` writes into its folder"""

    @abstractmethod
    def key(self) -> Any:
        """JSON values of all settings that decide a model, given its labels."""

    @abstractmethod
    def learn(
        self, labels: Sequence[Atoms], folder: Path, previous: Path | None, scale: float, progress: Progress
    ) -> dict[str, Any]:
        """Train on all labels; from then on this is the model that the other functions speak of.

        Args:
            labels: the data set; longer than at the last call, or from the beginning again.
            folder: for `files`.
            previous: folder of the model before this one.
            scale: conformal factor on predicted errors.
            progress: called now and then in long trainings.

        Returns:
            'model' in an entry of history.json.
        """

    @abstractmethod
    def load(self, folder: Path, summary: dict[str, Any], labels: Sequence[Atoms]) -> None:
        """Take the model that `learn` has left in a folder, with what it returned and what it learnt."""

    @property
    @abstractmethod
    def noise(self) -> float:
        """Noise of the labels or truncation of the model, eV/Å; 0 if it has none."""

    @abstractmethod
    def judge(self, labels: Sequence[Atoms]) -> list[Judgement]:
        """Predicted and true errors on labelled structures."""

    @abstractmethod
    def errors_on(self, labels: Sequence[Atoms]) -> dict[str, Any]:
        """'train' or 'test' in an entry of history.json."""

    @abstractmethod
    def signals(self, frames: Sequence[Atoms], limits: ConvergenceSettings) -> list[Signal]:
        """Signals of convergence from frames of fresh trajectories; empty if this kind has none."""

    @abstractmethod
    def drops(self, candidates: Sequence[Atoms], frames: Sequence[Atoms]) -> list[float] | None:
        """Predicted relative drop of the mean error on frames by learning each candidate; None if not computed."""

    @abstractmethod
    def choose(self, candidates: Sequence[Atoms], count: int, rng: np.random.Generator) -> list[int]:
        """The most informative of several candidates."""


# ------------------------------------------------------------------------------------------ force constants


class ForceConstants(Learner):
    """Force constants of a crystal by Bayesian regression: a refit adds to sums over the data, and takes seconds."""

    lattice = True
    files = ("model.pt", "posterior.npz")

    def __init__(self, settings: DynamicRunSettings, box: Atoms, basis_file: Path, crystal: Atoms) -> None:
        """Build the cluster basis, or read it if it was built before.

        Args:
            settings: of the run.
            box: the ideal box of the dynamics.
            basis_file: where the basis is kept.
            crystal: the ideal crystal.
        """
        from ubmd.potentials.force_constants.fit import cached_basis
        from ubmd.potentials.force_constants.regression import NormalEquations

        assert settings.crystal is not None
        self.settings = settings.crystal
        wanted = self.settings
        self.basis = cached_basis(crystal, wanted.cutoffs, basis_file, wanted.decay, wanted.tolerance)
        self.box = self.basis.supercell(box)
        self._equations = NormalEquations(self.basis.parameter_orders)
        self._learnt: list[str] = []  # hashes of the labels in the sums
        self._first: tuple[Array, float] | None = None  # features and energy of the first label
        self._posterior: Any = None
        self._scale = 1.0

    def key(self) -> Any:
        """Cutoffs and options."""
        # A key that older runs did not have: those that leave it alone go on.
        usual = CrystalSettings.model_fields["tolerance"].default
        absent = {"tolerance"} if self.settings.tolerance == usual else set()
        return self.settings.model_dump(mode="json", exclude={"structure"} | absent)

    def learn(
        self, labels: Sequence[Atoms], folder: Path, previous: Path | None, scale: float, progress: Progress
    ) -> dict[str, Any]:
        """Add new labels to the sums, maximise the evidence, export."""
        from ubmd.potentials.force_constants.export import export_crystal
        from ubmd.potentials.force_constants.regression import Posterior, fit

        begin = time.monotonic()
        self._add(labels)
        start = (
            Posterior.load(previous / "posterior.npz") if previous and (previous / "posterior.npz").exists() else None
        )
        posterior = fit(self._equations, start, caution=self.settings.caution)
        energy = self._ideal_energy(labels, posterior)
        provenance = {"training_set_hash": dataset_hash(labels), "n_training": len(labels)}
        folder.mkdir(parents=True, exist_ok=True)
        posterior.save(folder / "posterior.npz")
        export_crystal(
            self.basis,
            posterior,
            folder / "model.pt",
            energy_scale=1.0,
            force_scale=scale,
            max_displacement=self.settings.max_displacement,
            energy=energy or 0.0,
            provenance=provenance,
        )
        self._posterior, self._scale = posterior, scale
        return {
            "noise": posterior.noise,
            "alpha": _by_order(posterior.alpha),
            "beta": posterior.beta,
            "gamma": _by_order(posterior.gamma),
            "parameters": _by_order(posterior.counts),
            "log_evidence": posterior.log_evidence,
            "converged": posterior.converged,
            "iterations": posterior.iterations,
            "noise_limited": list(posterior.noise_limited),
            "energy": energy,
            "force_scale": scale,
            "fit_seconds": round(time.monotonic() - begin, 3),
        }

    def load(self, folder: Path, summary: dict[str, Any], labels: Sequence[Atoms]) -> None:
        """The posterior; the sums are made again when they are needed."""
        from ubmd.potentials.force_constants.regression import Posterior

        self._posterior = Posterior.load(folder / "posterior.npz")
        self._scale = float(summary["force_scale"])

    @property
    def noise(self) -> float:
        """1/sqrt(β), eV/Å."""
        return float(self._posterior.noise)

    def judge(self, labels: Sequence[Atoms]) -> list[Judgement]:
        """Bayesian error against the largest true error of a component."""
        found = []
        for atoms in labels:
            matrix = self._matrix(atoms)
            difference = np.asarray(atoms.get_forces()).ravel() - self._posterior.forces(matrix)
            error = self._scale * self._posterior.bayesian_error(matrix)
            found.append(Judgement(error, float(np.abs(difference).max()), _rms(difference)))
        return found

    def errors_on(self, labels: Sequence[Atoms]) -> dict[str, Any]:
        """Forces only."""
        forces = [np.asarray(atoms.get_forces()) for atoms in labels]
        mean = self._posterior.mean
        differences = [f - self.basis.forces(mean, a, self.box) for f, a in zip(forces, labels, strict=True)]
        return _relative(np.concatenate(differences), np.concatenate(forces), len(labels))

    def signals(self, frames: Sequence[Atoms], limits: ConvergenceSettings) -> list[Signal]:
        """All three (`ubmd.potentials.force_constants.convergence`)."""
        from ubmd.potentials.force_constants.convergence import below_noise, determined, little_to_gain
        from ubmd.potentials.force_constants.regression import predicted_drops

        posterior = self._posterior
        found = [determined(posterior.gamma, posterior.counts, limits.determined)]
        if frames:
            matrices = [self._matrix(atoms) for atoms in frames]
            deviations = [self._scale * posterior.force_deviations(matrix) for matrix in matrices]
            found.append(below_noise(deviations, posterior.noise, limits.noise))
            found.append(little_to_gain(predicted_drops(posterior, matrices, matrices), limits.gain))
        return found

    def drops(self, candidates: Sequence[Atoms], frames: Sequence[Atoms]) -> list[float] | None:
        """By a rank update."""
        from ubmd.potentials.force_constants.regression import predicted_drops

        matrices = [self._matrix(atoms) for atoms in candidates]
        probes = [*matrices, *(self._matrix(atoms) for atoms in frames)]
        return [float(drop) for drop in predicted_drops(self._posterior, matrices, probes)]

    def choose(self, candidates: Sequence[Atoms], count: int, rng: np.random.Generator) -> list[int]:
        """Those that lower the mean error over all of them most."""
        from ubmd.potentials.force_constants.regression import select_batch

        return select_batch(self._posterior, [self._matrix(atoms) for atoms in candidates], count)

    def _matrix(self, atoms: Atoms) -> Array:
        return self.basis.force_matrix(atoms, self.box)

    def _add(self, labels: Sequence[Atoms]) -> None:
        """Bring the sums to these labels."""
        from ubmd.potentials.force_constants.regression import NormalEquations

        hashes = [dataset_hash([atoms]) for atoms in labels]
        if hashes[: len(self._learnt)] != self._learnt:
            self._equations, self._learnt, self._first = NormalEquations(self.basis.parameter_orders), [], None
        for atoms, label in list(zip(labels, hashes, strict=True))[len(self._learnt) :]:
            self._equations.add(self._matrix(atoms), atoms.get_forces(), energy=self._energy_row(atoms))
            self._learnt.append(label)

    def _energy_row(self, atoms: Atoms) -> tuple[Array, float] | None:
        """Features and energy relative to the first label (None for itself): the ideal crystal's is not needed."""
        if not self.settings.energies:
            return None
        features, energy = self.basis.energy_features(atoms, self.box), float(atoms.get_potential_energy())
        if self._first is None:
            self._first = features, energy
            return None
        return features - self._first[0], energy - self._first[1]

    def _ideal_energy(self, labels: Sequence[Atoms], posterior: Any) -> float | None:
        """Energy of the ideal crystal, eV per primitive cell, as the labels have it on average."""
        energies = [
            (float(atoms.get_potential_energy()) - float(posterior.energy(self.basis.energy_features(atoms, self.box))))
            / self.box.determinant
            for atoms in labels
            if "energy" in atoms.calc.results
        ]
        return math.fsum(energies) / len(energies) if energies else None


# ------------------------------------------------------------------------------------------ networks


class Network(Learner):
    """A Gaussian-moment network: warm starts, calibrated atomic uncertainties as errors."""

    files = ("model.pt", "weights.pt")

    def __init__(self, settings: DynamicRunSettings, threads: int) -> None:
        """``threads``: of the training; part of the result."""
        assert settings.model is not None
        assert settings.training is not None
        self.settings = settings
        self.model = settings.model
        self.training = settings.training.model_copy(update={"threads": threads})
        self._evaluator: Any = None
        self._known: list[Atoms] = []

    def key(self) -> Any:
        """Network, training and uncertainty."""
        training = self.training.model_dump(mode="json", exclude={"checkpoint_every"})
        tables = (self.model, self.settings.uncertainty)
        epochs = self.settings.dynamic.warm_epochs
        return [*(table.model_dump(mode="json") for table in tables), training, epochs, self.settings.seed]

    def learn(
        self, labels: Sequence[Atoms], folder: Path, previous: Path | None, scale: float, progress: Progress
    ) -> dict[str, Any]:
        """Train (from the previous weights if they are there), fit and calibrate the uncertainty, export."""
        from ubmd.potentials.gmnn.export import export_model
        from ubmd.potentials.gmnn.trainer import train

        training, validation = split(labels)
        warm = previous is not None and (previous / "weights.pt").exists()
        initial = previous / "weights.pt" if previous is not None and warm else None
        epochs = self.settings.dynamic.warm_epochs if warm else self.training.epochs
        trained = train(
            self.model,
            self.training,
            training,
            validation,
            folder / "train",
            self.settings.seed,
            initial=initial,
            epochs=epochs,
            progress=lambda row: progress(dict(row)),
        )
        copy_file(folder / "train" / "weights.pt", folder / "weights.pt")
        provenance = {"training_set_hash": dataset_hash(training)}
        metadata = export_model(
            [trained.model], training, validation, self.settings.uncertainty, folder / "model.pt", provenance
        )
        self.load(folder, {}, labels)
        return {"noise": 0.0, "force_scale": metadata["uncertainty"]["forces"]["scale"], "epochs": epochs}

    def load(self, folder: Path, summary: dict[str, Any], labels: Sequence[Atoms]) -> None:
        """The model file."""
        from ubmd.calculator import Evaluator

        self._evaluator = Evaluator(folder / "model.pt", self.settings.dynamic.precision)
        self._known = split(labels)[0]

    @property
    def noise(self) -> float:
        """None is known."""
        return 0.0

    def judge(self, labels: Sequence[Atoms]) -> list[Judgement]:
        """Calibrated uncertainty and root mean square error of the worst atoms."""
        found = []
        for atoms, prediction in zip(labels, self._evaluator.predict(labels), strict=True):
            difference = np.asarray(atoms.get_forces()) - prediction.forces
            worst = float(np.sqrt(np.mean(difference**2, axis=1)).max())
            found.append(Judgement(float(prediction.atomic_u.max()), worst, _rms(difference)))
        return found

    def errors_on(self, labels: Sequence[Atoms]) -> dict[str, Any]:
        """Forces and energies."""
        predictions = self._evaluator.predict(labels)
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

        predictions = self._evaluator.predict(candidates)
        known = self._evaluator.predict(self._known) if self._known else []
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
    """(training, validation): labels 1, 11, 21, ... validate, and stay there."""
    if len(labels) < 2:
        raise DataError("A network needs at least two labels: one trains, one validates.")
    validating = [k % 10 == 1 for k in range(len(labels))]
    pairs = list(zip(labels, validating, strict=True))
    return [a for a, v in pairs if not v], [a for a, v in pairs if v]


def _by_order(values: Any) -> dict[str, Any]:
    return {str(order): value for order, value in values.items()}


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _relative(differences: Array, forces: Array, structures: int) -> dict[str, Any]:
    error, size = _rms(differences), _rms(forces)
    relative = error / size if size > 0.0 else None
    return {"force_rmse": error, "force_rms": size, "relative": relative, "structures": structures}
