"""The kinds of potentials. Which one settings or a model file are of is asked here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ubmd.settings import TrainSettings
from ubmd.settings.dynamic import DynamicRunSettings


@dataclass(frozen=True)
class Kind:
    """One kind of potential. Its parts are loaded when they are needed (PEP 562): some need torch."""

    name: str
    evaluator: str
    """class 'module:name' for `ubmd.calculator.Evaluator`: (module of the file, its record, precision)"""
    learner: str
    """class 'module:name' of `ubmd.potentials.learner.Learner`"""
    of_crystal: bool = False
    """whether it is one of a crystal: atoms have sites, and stresses are those beyond the ideal crystal's own"""

    def make_evaluator(self, module: Any, record: dict[str, Any], precision: str) -> Any:
        """What evaluates a model file of this kind."""
        return _load(self.evaluator)(module, record, precision)

    def learner_class(self) -> Any:
        """The class of the dynamic schedule's view of this kind."""
        return _load(self.learner)


NETWORK = Kind("network", "ubmd.potentials.evaluator:NetworkEvaluator", "ubmd.potentials.gmnn.learner:Network")
FORCE_CONSTANTS = Kind(
    "force constants",
    "ubmd.potentials.force_constants.evaluator:CrystalEvaluator",
    "ubmd.potentials.force_constants.learner:ForceConstants",
    of_crystal=True,
)


def kind_of_record(record: dict[str, Any]) -> Kind:
    """Kind of a model file, by its record."""
    return FORCE_CONSTANTS if "lattice" in record else NETWORK


def kind_of_settings(settings: TrainSettings | DynamicRunSettings) -> Kind:
    """Kind of the potential that these settings train."""
    return NETWORK if settings.crystal is None else FORCE_CONSTANTS


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
