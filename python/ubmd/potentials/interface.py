"""What all potentials have in common: what they predict, how they are trained, and when one is converged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings

if TYPE_CHECKING:  # the command line looks up kinds before it needs these
    import numpy as np
    from ase import Atoms


@dataclass(frozen=True)
class Prediction:
    """What a model says about one structure.

    energy: eV; forces: [n, 3] eV/Å; stress: [6] eV/Å^3, ASE order (None without a cell; of crystals what exceeds the
    stress of the ideal one); u: calibrated structure uncertainty, eV/atom; atomic_u: [n] calibrated, eV/Å; feature: [p]
    structure feature, divided by the model's feature scale so that lambda2 of its settings applies. Of crystals it is
    Wᵀφ (S = W Wᵀ is the posterior covariance, φ the mean derivative of the energy by the parameters), whose length is
    the uncalibrated u.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None
    u: float
    atomic_u: np.ndarray
    feature: np.ndarray


@dataclass(frozen=True)
class Signal:
    """One signal of convergence."""

    name: str
    """'determined', 'below noise' or 'little to gain'"""
    holds: bool
    value: float
    threshold: float
    reason: str
    """one sentence"""
    evidence: dict[str, Any]
    """the numbers that it saw, as JSON values"""

    def as_json(self) -> dict[str, Any]:
        """For events and history."""
        return asdict(self)


def converged(signals: Sequence[Signal]) -> bool:
    """All three signals are there and hold."""
    return {s.name for s in signals} == {"determined", "below noise", "little to gain"} and all(
        s.holds for s in signals
    )


class ModelEvaluator(Protocol):
    """What evaluates the model files of one kind of potential; see `ubmd.calculator.Model` for the methods."""

    def predict(self, structures: Iterable[Atoms]) -> list[Prediction]: ...

    def predict_with_gradient(self, atoms: Atoms) -> tuple[Prediction, np.ndarray, np.ndarray | None]: ...

    def uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray | None]: ...

    def atomic_uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]: ...


Report = Callable[[dict[str, Any]], None]
"""called after every epoch with 'epoch' (from 1), 'epochs' (all), and whatever else is known; the command line shows
what there is of {train,valid}_{energy_rmse_meV_per_atom,force_rmse_eV_per_A,stress_rmse_MPa}"""


@dataclass(frozen=True)
class Labels:
    """What a network learns from: labelled structures."""

    training: Sequence[Atoms]
    validation: Sequence[Atoms]
    """for early stopping; never trained on"""


@dataclass(frozen=True)
class TrainingTable:
    """How a network is trained."""

    model: ModelSettings
    training: TrainingSettings
    epochs: int | None = None
    """instead of ``training.epochs``"""
    fresh: bool = False
    """start again even if the folder has a checkpoint"""
    prolong: bool = False
    """keep what is needed to continue a finished training, and continue one that had fewer epochs"""


@dataclass(frozen=True)
class RawModule:
    """A trained module whose uncertainty is not fitted."""

    module: Any
    """`ubmd.potentials.deployed.Deployed`, or a TorchScript file: forward(species [n_local + n_ghost], edge_index
    [2, P], edge_vector [P, 3] in Å, n_local) -> (energies [n_local] in eV, float64; features [n_local, p]), both
    differentiable by edge_vector. Centres, edge_index[0], are the atoms below n_local; with ``layers`` > 1 others are,
    too, whose energies and features only carry messages"""
    elements: list[str]
    """the species 0, 1, ... of the module"""
    cutoff: float
    """Å"""
    n_features: int
    precision: str = "float64"
    """that the network was trained in: float32 or float64"""
    record: dict[str, Any] = field(default_factory=dict)
    """further JSON values for the record of the model file"""
    operators: Sequence[str] = ()
    """libraries of compiled operators that the module needs"""
    fixed_precision: bool = False
    """whether the module runs in ``precision`` only, as where buffers hold physics: users of the file cannot choose
    another, and none of its numbers is converted"""
    layers: int = 1
    """steps of message passing: results for an atom depend on edges that are up to layers - 1 edges away from it, so
    its interaction range is layers times the cutoff. 1: on the edges of that atom alone"""
    backend: dict[str, str] = field(default_factory=dict)
    """where the module is from, for the record: name, version, checkpoint (its hash), licence; what is known of them"""


@dataclass(frozen=True)
class Summary:
    """How a training went."""

    best: dict[str, Any]
    """what `Report` was told about the epoch whose weights are in the checkpoint"""
    epochs: int
    """that were trained"""
    seconds: float | None = None
    """that they took together, those before an interruption included"""
    note: str = ""
    """what to know of these errors, in a few words"""


class Backend(Protocol):
    """A kind of network. Everything else (uncertainty, calibration, model file, LAMMPS) is the same for all.

    An instance is made without arguments, in the driver and in workers.

    Force constants are no back end: the covariance is part of their regression (force rows, a noise, a prior for each
    order), while a back end's uncertainty is fitted to features per atom of a finished module, and their module needs
    the sites of a crystal where `RawModule` has edges alone. Behind this protocol, covariance, lattice and ideal energy
    would have to bypass it; what both have in common is `ubmd.potentials.learner.Learner`.
    """

    name: str
    """in the record of model files"""
    checkpoint: str
    """name of the file that `train` leaves in its folder"""
    uncertainties: Sequence[str]
    """values of uncertainty.kind that it has features for"""

    def train(
        self, labels: Labels, table: TrainingTable, folder: Path, start: Path | None, seed: int, report: Report | None
    ) -> Path:
        """Train, or resume the training that was interrupted in this folder.

        Args:
            labels: what is learnt.
            table: how.
            folder: for the files of the training; made if missing.
            start: checkpoint of an earlier model to start from.
            seed: of everything random.
            report: called after every epoch; what it raises ends the training.

        Returns:
            The checkpoint; ``folder / checkpoint``.

        Raises:
            DataError, ModelError, TrainingError: as their names say.
        """

    def raw_module(self, checkpoints: Sequence[Path], features: UncertaintySettings) -> RawModule:
        """The module of a checkpoint (several: of an ensemble), with the features that this uncertainty needs."""


@runtime_checkable
class Configured(Protocol):
    """What a back end may have besides `Backend`: settings that it needs before and after trainings, too."""

    def configure(self, model: ModelSettings, base: Path) -> None:
        """Take the settings; called once, after the instance is made, before anything else.

        Args:
            model: settings of the network.
            base: folder of the settings file; paths are relative to it.

        Raises:
            SettingsError: something is missing, as far as that is known without running anything.
        """

    def check(self) -> None:
        """Look whether everything runs; called once, before a training or a run begins. Errors as for `configure`."""

    def files(self) -> Sequence[Path]:
        """Files that the settings name, whose change is said when a run is resumed."""


@runtime_checkable
class TrainsElsewhere(Protocol):
    """What a back end may have besides `Backend`: a Python of its own that trains, with another torch."""

    def check_device(self, device: str) -> None:
        """Whether it can train on ``training.device``; called once, before a training or a run begins.

        Raises:
            SettingsError: it cannot.
        """


@runtime_checkable
class Adapts(Protocol):
    """What a back end may have besides `Backend`: trainings that start from more than its own checkpoints."""

    def adapt(self, source: Path, labels: Sequence[Atoms], targets: Sequence[Path]) -> dict[str, float]:
        """Write checkpoints to start from, whose constants of the elements fit other labels.

        Args:
            source: a checkpoint or a model file.
            labels: labelled structures without the baseline of the settings.
            targets: a checkpoint for each network.

        Returns:
            element -> what was added to the energy of an atom, eV.

        Raises:
            ModelError: the file does not fit.
        """


@runtime_checkable
class Prolongs(Protocol):
    """What a back end may have besides `Backend`: finished trainings that continue with more epochs."""

    def prolongation(self, folder: Path, epochs: int) -> str:
        """How a training of so many epochs continues the one in this folder, as a sentence; empty if it does not."""


@runtime_checkable
class KeepsLog(Protocol):
    """What a back end may have besides `Backend`: a log of its trainings, and their summaries afterwards."""

    logs: Sequence[str]
    """names of the files that `train` leaves in its folder for people: log, picture"""

    def summary(self, folder: Path) -> Summary | None:
        """Of the training that has ended in this folder, now or earlier; None if no weights were trained."""
