"""Settings of the potentials: network, training, uncertainty, force constants; and of `ubmd train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from ubmd.devices import Device
from ubmd.errors import SettingsError
from ubmd.settings.labels import LABELS, LabelSources
from ubmd.settings.marks import ELSEWHERE, LATE, NOTHING, late
from ubmd.settings.table import Table


class ModelSettings(Table):
    """The network: by default the Gaussian-moment neural network, to which all keys from ``size`` on belong."""

    kind: Annotated[str, LATE] = Field(
        "gmnn",
        description="gmnn, mace (in a Python of its own), file (a TorchScript module of yours), the name of an "
        "installed back end (entry point ubmd.backends), or an import path 'module:Class' of one, also beside the "
        "settings file",
    )
    arguments: Annotated[dict[str, Any], LATE] = Field(
        default_factory=dict,
        description="arguments of a back end other than gmnn; of mace those of its own command mace_run_train, e.g. "
        "{r_max = 5.0, num_channels = 64}",
    )
    checkpoint: Annotated[Path | None, LATE] = Field(
        None,
        description="file of the trained network that kind = mace starts from (default: from scratch) or kind = file "
        "uses; relative to the settings file",
    )
    python: Annotated[Path | None, NOTHING] = Field(
        None,
        description="interpreter that has the package of kind = mace, e.g. mace-env/bin/python; relative to the "
        "settings file",
    )
    features: Annotated[Literal["nodes", "readout", "last-layer"], LATE] = Field(
        "nodes",
        description="what the uncertainty of kind = mace sees: nodes (invariant node features of all layers), readout "
        "(sketched gradient features of the readouts) or last-layer (those of the last weights only)",
    )
    baseline: Annotated[Literal["zbl"] | None, LATE] = Field(
        None,
        description="what the network is added to: zbl, the screened repulsion of nuclei (eV), up to the sum of two "
        "covalent radii; default: nothing",
    )
    atom_energies: Annotated[dict[str, FiniteFloat], LATE] = Field(
        default_factory=dict,
        description="energies of the isolated atoms, eV, of all elements, e.g. {H = -13.6, O = -430.1}; default: "
        "fitted to the labels",
    )
    size: Literal["light", "paper"] = Field(
        "light", description="named size: light (5 radial functions, 360 invariants) or paper (7, 910)"
    )
    cutoff: float = Field(5.0, gt=0.5, description="cutoff radius r_c, Å; shorter: fewer labels needed, faster")
    n_radial: int | None = Field(None, ge=1, description="radial functions per element pair; overrides size")
    n_basis: int | None = Field(None, ge=1, description="Gaussian basis functions; overrides size")
    r_min: float = Field(0.5, ge=0, description="centre of the first Gaussian, Å")
    hidden: tuple[int, int] = Field((512, 512), description="neurons of the two hidden layers")
    elements: tuple[str, ...] | None = Field(
        None, description="element names; default: those found in the training data, sorted by number"
    )

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> ModelSettings:
        for name in ("checkpoint", "python", "features"):
            if name not in KEYS_OF.get(self.kind, ()) and getattr(self, name) != type(self).model_fields[name].default:
                kinds = " or ".join(repr(kind) for kind, names in KEYS_OF.items() if name in names)
                raise ValueError(f"model.{name} belongs to model.kind = {kinds}, not to {self.kind!r}")
        if self.kind == "gmnn":
            if self.arguments:
                raise ValueError("model.arguments are for back ends other than model.kind = 'gmnn'; remove them")
            return self
        for name, field in type(self).model_fields.items():
            if name in KEYS_OF_GMNN and getattr(self, name) != field.default:
                raise ValueError(
                    f"model.{name} belongs to model.kind = 'gmnn'; what {self.kind!r} takes goes into [model.arguments]"
                )
        return self

    @property
    def known_cutoff(self) -> float | None:
        """The cutoff radius, Å; None for back ends other than gmnn, which have their own."""
        return self.cutoff if self.kind == "gmnn" else None


KEYS_OF_GMNN = ("size", "cutoff", "n_radial", "n_basis", "r_min", "hidden")  # keys of [model] that no other kind has
KEYS_OF = {"file": ("checkpoint",), "mace": ("checkpoint", "python", "features")}  # and those that these kinds share
# keys of [training] that they use; device, threads and checkpoint_every are the business of a run
TRAINING_OF = {"file": ("mode",), "mace": ("mode", "epochs", "batch_size", "precision")}


class TrainingSettings(Table):
    """Optimisation of the network; of kind = mace only mode, epochs, batch_size, precision, device and threads."""

    mode: Annotated[Literal["fine-tune", "refit", "none"] | None, LATE] = Field(
        None,
        description="what is trained of a network that exists: fine-tune (all weights), refit (constants of the "
        "elements only) or none (only the calibration); default: fine-tune for kind = mace, refit for kind = file",
    )
    epochs: int = Field(1000, ge=1, description="epochs from scratch")
    batch_size: int = Field(
        5,
        ge=1,
        description="structures per mini-batch; small ones need fewer epochs, large ones fewer seconds per epoch",
    )
    energy_weight: float = Field(1.0, ge=0, description="w_E, weight of squared energy errors, 1/eV^2")
    force_weight: float = Field(4.0, ge=0, description="w_F, weight of squared force errors, Å^2/eV^2")
    stress_weight: float = Field(0.01, ge=0, description="w_S, weight of squared errors of V·stress, 1/eV^2")
    fixed_forces: Annotated[bool, LATE] = Field(
        True, description="train on the forces of fixed atoms (FixAtoms), too; the labels have them in any case"
    )
    learning_rate: float = Field(0.03, gt=0, description="Adam step of the layers, decays linearly to 0 (no unit)")
    learning_rate_radial: float = Field(0.02, gt=0, description="Adam step of the radial coefficients B (no unit)")
    learning_rate_shift: float = Field(0.05, gt=0, description="Adam step of the shifts mu (no unit)")
    learning_rate_scale: float = Field(0.001, gt=0, description="Adam step of the scales sigma (no unit)")
    precision: Literal["float32", "float64"] = Field(
        "float32", description="precision of the network; energies are always summed in float64"
    )
    validation_every: int = Field(1, ge=1, description="epochs between validations (early stopping, log, picture)")
    checkpoint_every: Annotated[int, NOTHING] = Field(
        50, ge=1, description="epochs between checkpoints that a killed run resumes from"
    )
    warm_learning_rate_factor: float = Field(
        1.0, gt=0, description="factor on all learning rates when training starts from an earlier model (no unit)"
    )
    warm_keep: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share k of earlier weights W in a warm start, k W + sqrt(1 - k^2) random (no unit)",
    )
    device: Annotated[Device, NOTHING] = Field(
        "cpu",
        description="where networks are trained, calibrated and evaluated: cpu, cuda (the first GPU) or cuda:n (GPU "
        "number n, from 0); of kind = mace also where mace_run_train trains. A run may be resumed on another device",
    )
    threads: Annotated[int | None, ELSEWHERE] = Field(None, ge=1, description="torch threads; default: all cores")


def keys_without_effect(kind: str) -> frozenset[str]:
    """Keys of [model] and [training], as 'model.cutoff', that this kind of network doesn't use.

    >>> sorted(keys_without_effect("gmnn"))
    ['model.arguments', 'model.checkpoint', 'model.features', 'model.python', 'training.mode']
    """
    of_others = {name for names in KEYS_OF.values() for name in names} - set(KEYS_OF.get(kind, ()))
    of_others |= {"arguments"} if kind == "gmnn" else set(KEYS_OF_GMNN)
    return frozenset({f"model.{name}" for name in of_others} | {f"training.{name}" for name in _unused_training(kind)})


def _unused_training(kind: str) -> set[str]:
    """Keys of [training] without effect on this kind of network."""
    used = TRAINING_OF.get(kind, set(TrainingSettings.model_fields) - {"mode"})
    return set(TrainingSettings.model_fields) - {*used, "device", "threads", "checkpoint_every"}


def check_mode(model: ModelSettings, training: TrainingSettings) -> None:
    """ValueError for keys of [training] without effect on this kind of network, or a mode that it does not have."""
    unused = _unused_training(model.kind) - {"mode"}
    for name, field in TrainingSettings.model_fields.items():
        if name in unused and getattr(training, name) != field.default:
            hint = "; what mace_run_train takes goes into [model.arguments]" if model.kind == "mace" else ""
            raise ValueError(f"training.{name} has no effect on model.kind = {model.kind!r}; remove it{hint}")
    if training.mode is None:
        return
    if model.kind not in KEYS_OF:
        raise ValueError(f"training.mode is for model.kind = 'mace' or 'file', not for {model.kind!r}; remove it")
    if model.kind == "file" and training.mode == "fine-tune":
        raise ValueError("training.mode = 'fine-tune' is not for model.kind = 'file', whose weights stay; use 'refit'")
    if model.checkpoint is None and training.mode != "fine-tune":
        raise ValueError(
            f"training.mode = {training.mode!r} needs model.checkpoint, the network that it leaves as it is"
        )


class UncertaintySettings(Table):
    """Gradient-feature uncertainty and its conformal calibration."""

    kind: Literal["posterior", "last-layer", "distance", "ensemble"] = Field(
        "posterior",
        description="posterior or distance of gradient features, last-layer (posterior of cheap features) or "
        "ensemble (spread of several networks)",
    )
    members: int = Field(3, ge=2, description="networks that kind = 'ensemble' trains")
    references: int = Field(
        256, ge=1, description="atomic training features that kind = 'distance' keeps (structures: all)"
    )
    projections: int = Field(512, ge=1, description="random projections p of the gradient-feature sketch")
    lambda2: float = Field(1e-4, gt=0, description="ridge lambda^2 of the posterior, for rescaled features (no unit)")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="miscoverage of conformal calibration: 0.05 = 95 % confidence (no unit)"
    )
    seed: int = Field(0, ge=0, description="seed of the random projections (stored in the model file)")
    atoms_by: Literal["atom", "structure"] = Field(
        "atom", description="calibrate atomic uncertainties by atoms, or by the maximum of each structure"
    )
    by_element: Annotated[bool, late(False)] = Field(
        True,
        description="calibrate atomic uncertainties of each element with a factor of its own (drawn towards the common "
        "one where fewer structures than the confidence needs have it), then all together",
    )

    @property
    def networks(self) -> int:
        """Number of networks to train."""
        return self.members if self.kind == "ensemble" else 1


ORDERS = ("2", "3", "4", "5", "6")  # of force constants, as keys of a table


class CrystalSettings(Table):
    """A force-constant potential: energy and forces as a polynomial of the displacements from an ideal crystal."""

    structure: Annotated[Path, NOTHING] = Field(
        description="file of the ideal crystal, its primitive cell or any supercell of it; relative to the settings "
        "file"
    )
    cutoffs: dict[int, float] = Field(
        description="largest distance inside a cluster by order, Å, e.g. {2 = 5.4, 3 = 4.0, 4 = 4.0}; orders 2 to 6, "
        "none skipped"
    )
    max_displacement: float | None = Field(
        None,
        gt=0,
        description="LAMMPS stops when an atom is further than this from its site, Å; default: 0.4 of the shortest "
        "distance between sites, 0.55 with pairs",
    )
    pairs: Annotated[float | None, LATE] = Field(
        None,
        gt=0,
        description="cutoff of pair functions of the true distance, Å, e.g. 5.2: for soft crystals, whose atoms leave "
        "a polynomial without bound; default: force constants alone",
    )
    stable: Annotated[bool, LATE] = Field(
        False,
        description="allow no negative curvature at the ideal crystal: not of the second order, and not of the whole "
        "energy, in multiples of the labels' box and on a mesh of wave vectors; with pairs, a wall begins where "
        "displacements of neighbours differ by more than in any label, if there are orders above 2, and the energy has "
        "a lower bound",
    )
    decay: float | None = Field(
        None,
        gt=0,
        description="length over which force constants are expected to decay by a factor e with the size of their "
        "cluster, Å: for labels of a box shorter than twice a cutoff, where a pair and its periodic images look alike; "
        "default: no such expectation",
    )
    energies: bool = Field(False, description="fit the energies of the labels too, not only their forces")
    tolerance: Annotated[float, LATE] = Field(
        1e-5,
        gt=0,
        description="how far the crystal may deviate from its symmetry, Å; above 1e-5 it is symmetrised first, e.g. "
        "1e-3 for a file with 4 decimals",
    )
    caution: float = Field(
        0.5,
        ge=0,
        description="hyperprior that keeps an order without information in the labels from being switched off; 0: the "
        "bare evidence (no unit)",
    )

    @field_validator("cutoffs", mode="before")
    @classmethod
    def _orders_are_known(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                if str(key) not in ORDERS:
                    nearest = min(ORDERS, key=lambda order: abs(int(order) - _as_number(key)))
                    raise ValueError(f"crystal.cutoffs has no order '{key}'; did you mean '{nearest}'?")
        return value

    @field_validator("cutoffs")
    @classmethod
    def _orders_follow_each_other(cls, value: dict[int, float]) -> dict[int, float]:
        for order, cutoff in value.items():
            if not (math.isfinite(cutoff) and cutoff > 0.0):
                raise ValueError(f"crystal.cutoffs.{order} must be a length above zero, Å, not {cutoff:g}")
        missing = sorted(set(range(2, max(value, default=2) + 1)) - set(value))
        if missing:
            raise ValueError(
                f"crystal.cutoffs lacks order {missing[0]}; give a cutoff in Å for every order from 2 to the highest"
            )
        return dict(sorted(value.items()))

    def structure_file(self, base: Path) -> Path:
        """The crystal's file; ``base`` is the folder of the settings file. Raises SettingsError if it is missing."""
        path = base / self.structure
        if not path.is_file():
            raise SettingsError(f"There is no file {path} for crystal.structure; give the ideal crystal's file.")
        return path


def _as_number(key: Any) -> float:
    """A key as a number for the nearest order; 2 for text."""
    try:
        return float(key)
    except ValueError:
        return 2.0


class TrainSettings(Table):
    """Everything that `ubmd train` needs."""

    training_file: Path = Field(
        description="structures with labels: extxyz, any file that ASE reads, or a folder of deepmd/npy "
        "(ubmd[formats]); relative to the settings file"
    )
    validation_file: Path | None = Field(None, description="the same; default: split from training_file")
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="share split off when there is no validation_file (no unit)"
    )
    labels: LabelSources = Field(default_factory=dict, description=LABELS)
    output_dir: Path = Field(description="folder for log, picture and model.pt; relative to the working directory")
    seed: int = Field(0, ge=0, description="seed of the initial weights, the split and the order of mini-batches")
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    uncertainty: UncertaintySettings = Field(default_factory=UncertaintySettings)
    crystal: CrystalSettings | None = Field(
        None, description="a force-constant potential of a crystal instead of a network; default: a network"
    )

    @model_validator(mode="after")
    def _mode_is_of_the_kind(self) -> TrainSettings:
        check_mode(self.model, self.training)
        return self

    @model_validator(mode="after")
    def _crystals_have_no_network(self) -> TrainSettings:
        if self.crystal is None:
            return self
        for name in ("model", "training"):
            if name in self.model_fields_set:
                raise ValueError(
                    f"[{name}] is for networks and [crystal] trains a force-constant potential; remove one of them"
                )
        unused = sorted(self.uncertainty.model_fields_set - CRYSTAL_UNCERTAINTY)
        if unused:
            raise ValueError(
                f"uncertainty.{unused[0]} has no effect on a force-constant potential; remove it ([crystal] uses "
                "alpha and atoms_by only)"
            )
        return self


CRYSTAL_UNCERTAINTY = {"alpha", "atoms_by"}  # keys of [uncertainty] that force-constant potentials use
