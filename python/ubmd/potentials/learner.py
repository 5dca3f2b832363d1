"""What a dynamic run trains: force constants, or a network. The engine knows only `Learner`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.data.labelled_range import LabelledRange
from ubmd.potentials.interface import Signal
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
    least_labels = 2
    """labels that the first model needs"""
    scale_in_errors = False
    """whether predicted errors include the conformal factor of an entry of history.json"""
    files: tuple[str, ...] = ("model.pt",)
    """what `learn` writes into its folder"""

    @classmethod
    @abstractmethod
    def make(cls, settings: DynamicRunSettings, base: Path, box: Atoms, folder: Path, threads: int) -> Self:
        """The learner of a run.

        Args:
            settings: of the run.
            base: folder that the settings' paths are relative to.
            box: ideal box of the dynamics.
            folder: of the run.
            threads: of trainings.

        Raises:
            SettingsError, DataError: box and settings do not go together.
        """

    @classmethod
    def inputs(cls, settings: DynamicRunSettings, base: Path) -> dict[str, Path]:
        """Key -> file of what it reads besides the box."""
        return {}

    @classmethod
    def ideal(cls, structure: Atoms, settings: DynamicRunSettings) -> Atoms:
        """The structure of which the box is made, if ``start.file`` is not set."""
        return structure

    @classmethod
    def plan(cls, settings: DynamicRunSettings, base: Path, box: Atoms) -> Iterator[str]:
        """What a run would train, in sentences; errors as in `make`."""
        yield from ()

    def describe(self) -> dict[str, Any]:
        """Values of the event 'basis'; empty if there is nothing to say before the first model."""
        return {}

    @abstractmethod
    def key(self) -> Any:
        """JSON values of all settings that determine a model, given its labels."""

    @abstractmethod
    def learn(
        self, labels: Sequence[Atoms], folder: Path, previous: Path | None, scale: float, progress: Progress
    ) -> dict[str, Any]:
        """Train on all labels; from then on this is the model that the other functions use.

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

    def labelled_range(self, labels: Sequence[Atoms]) -> LabelledRange | None:
        """How far displacements differ in the labels, in the box of the dynamics; None for models without a lattice."""
        return None

    @abstractmethod
    def choose(self, candidates: Sequence[Atoms], count: int, rng: np.random.Generator) -> list[int]:
        """The most informative of several candidates."""


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _relative(differences: Array, forces: Array, structures: int) -> dict[str, Any]:
    error, size = _rms(differences), _rms(forces)
    relative = error / size if size > 0.0 else None
    return {"force_rmse": error, "force_rms": size, "relative": relative, "structures": structures}
