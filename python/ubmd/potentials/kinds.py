"""The kinds of potentials. The kind of settings or of a model file is determined here, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubmd.devices import check_device
from ubmd.errors import SettingsError, describe
from ubmd.files import file_hash
from ubmd.imports import import_attribute, load, own_files
from ubmd.potentials.interface import Backend, Configured, ModelEvaluator, TrainsElsewhere
from ubmd.settings import ModelSettings, TrainingSettings, TrainSettings, UncertaintySettings
from ubmd.settings.dynamic import DynamicRunSettings

if TYPE_CHECKING:  # the command line looks up kinds before it needs numpy
    from ubmd.potentials.learner import Learner


@dataclass(frozen=True)
class Kind:
    """One kind of potential. Its parts are loaded when they are needed (PEP 562): some need torch."""

    name: str
    evaluator: str
    """class 'module:name' for `ubmd.calculator.Model`: (module of the file, its record, precision, device)"""
    learner: str
    """class 'module:name' of `ubmd.potentials.learner.Learner`"""
    of_crystal: bool = False
    """whether it is one of a crystal: atoms have sites, and stresses are those beyond the ideal crystal's own"""

    def make_evaluator(self, module: Any, record: dict[str, Any], precision: str, device: str) -> ModelEvaluator:
        """What evaluates a model file of this kind, whose module is on a device."""
        evaluator: ModelEvaluator = load(self.evaluator)(module, record, precision, device)
        return evaluator

    def learner_class(self) -> type[Learner]:
        """The class of the dynamic schedule's view of this kind."""
        learner: type[Learner] = load(self.learner)
        return learner


NETWORK = Kind("network", "ubmd.potentials.evaluator:NetworkEvaluator", "ubmd.potentials.network_learner:Network")
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


BACKENDS = {
    "gmnn": "ubmd.potentials.gmnn.backend:GaussianMoments",
    "file": "ubmd.potentials.given:GivenModule",
    "mace": "ubmd.potentials.mace.backend:Mace",
}
_GROUP = "ubmd.backends"  # of entry points


def backend_of(model: ModelSettings, base: Path) -> Backend:
    """The back end that ``model.kind`` names.

    Args:
        model: settings of the network.
        base: folder of the settings file; modules in it count, too.

    Raises:
        SettingsError: there is none of this name, it cannot be imported, or it is no back end.
    """
    installed = {} if model.kind in BACKENDS else {entry.name: entry.value for entry in entry_points(group=_GROUP)}
    found = import_attribute(
        model.kind,
        base,
        installed | BACKENDS,
        key="model.kind",
        what="the name of an installed back end",
        example="my_module:MyBackend",
    )
    try:
        backend: Backend = found() if isinstance(found, type) else found
    except Exception as error:
        raise SettingsError(f"model.kind = {model.kind!r} could not be created: {describe(error)}.") from error
    missing = [name for name in _PARTS if not hasattr(backend, name)]
    if missing:
        raise SettingsError(
            f"model.kind = {model.kind!r} is not a back end: it has no {missing[0]!r} (see Backend in "
            "ubmd/potentials/interface.py)."
        )
    if isinstance(backend, Configured):
        backend.configure(model, base)
    return backend


_PARTS = ("name", "checkpoint", "uncertainties", "train", "raw_module")


def check_backend(model: ModelSettings, uncertainty: UncertaintySettings, base: Path) -> Backend:
    """`backend_of`; SettingsError also if it has no features for this uncertainty, or a program of it does not run."""
    backend = backend_of(model, base)
    if uncertainty.kind not in backend.uncertainties:
        raise SettingsError(
            f"model.kind = {model.kind!r} does not support uncertainty.kind = '{uncertainty.kind}', only "
            f"{', '.join(backend.uncertainties)}."
        )
    if isinstance(backend, Configured):
        backend.check()
    return backend


def check_training_device(backend: Backend, training: TrainingSettings) -> None:
    """SettingsError if ``training.device`` is not there, in the Python that trains."""
    if isinstance(backend, TrainsElsewhere):
        backend.check_device(training.device)
    else:
        check_device(training.device, "training.device")


def backend_files(model: ModelSettings | None, base: Path) -> dict[str, str]:
    """Path -> SHA-256 of files that make the network, relative to the folder of the settings file if they are in it.

    These are the back end's modules beside the settings file, and what the settings name (`Configured.files`). Empty
    without a network. Errors as for `backend_of`.
    """
    if model is None:
        return {}
    backend, folder = backend_of(model, base), Path(base).resolve()
    named = [path.resolve() for path in backend.files()] if isinstance(backend, Configured) else []
    own = dict(own_files((part.__module__ for part in type(backend).__mro__), base))
    return own | {str(p.relative_to(folder) if p.is_relative_to(folder) else p): file_hash(p) for p in named}
