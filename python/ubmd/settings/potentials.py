"""Settings of every stage: one TOML file per run, one pydantic model per table.

Every field states its unit in its description; ``ubmd schema`` prints the JSON schema and
``ubmd init`` a commented template made from the same descriptions.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from ubmd.errors import SettingsError


class Table(BaseModel):
    """A table of the settings file: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


LABEL_NAMES = ("energy", "forces", "stress", "virial")
"""what a key of a file may be named for; a virial is read as a stress"""


def check_label_names(value: dict[str, str]) -> dict[str, str]:
    """ValueError if keys are named for a label that does not exist, with the nearest one that does."""
    for name in value:
        if name not in LABEL_NAMES:
            near = difflib.get_close_matches(name, LABEL_NAMES, n=1, cutoff=0.0)
            raise ValueError(f"there is no label '{name}', only {', '.join(LABEL_NAMES)}; the nearest is '{near[0]}'")
    return value


LabelKeys = Annotated[dict[str, str], AfterValidator(check_label_names)]
_LABEL_KEYS = (
    "keys of its labels where they are not energy, forces, stress (or REF_energy ...), e.g. "
    '{energy = "dft_energy", forces = "dft_forces"}; virial (eV) instead of stress (eV/Å^3) is possible'
)

T = TypeVar("T", bound="Table")
_FEWEST_WARM_EPOCHS = 10  # however few of the labels are new


class ModelSettings(Table):
    """The Gaussian-moment neural network."""

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


class TrainingSettings(Table):
    """Optimisation of the network."""

    epochs: int = Field(1000, ge=1, description="epochs from scratch")
    batch_size: int = Field(
        5,
        ge=1,
        description="structures per mini-batch; small ones need fewer epochs, large ones fewer seconds per epoch",
    )
    energy_weight: float = Field(1.0, ge=0, description="w_E, weight of squared energy errors, 1/eV^2")
    force_weight: float = Field(4.0, ge=0, description="w_F, weight of squared force errors, Å^2/eV^2")
    stress_weight: float = Field(0.01, ge=0, description="w_S, weight of squared errors of V·stress, 1/eV^2")
    learning_rate: float = Field(0.03, gt=0, description="Adam step of the layers, decays linearly to 0 (no unit)")
    learning_rate_radial: float = Field(0.02, gt=0, description="Adam step of the radial coefficients B (no unit)")
    learning_rate_shift: float = Field(0.05, gt=0, description="Adam step of the shifts mu (no unit)")
    learning_rate_scale: float = Field(0.001, gt=0, description="Adam step of the scales sigma (no unit)")
    precision: Literal["float32", "float64"] = Field(
        "float32", description="precision of the network; energies are always summed in float64"
    )
    validation_every: int = Field(1, ge=1, description="epochs between validations (early stopping, log, picture)")
    checkpoint_every: int = Field(50, ge=1, description="epochs between checkpoints that a killed run resumes from")
    warm_learning_rate_factor: float = Field(
        1.0, gt=0, description="factor on all learning rates when training starts from an earlier model (no unit)"
    )
    warm_keep: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share k of earlier weights W in a warm start, k W + sqrt(1 - k^2) random (no unit)",
    )
    threads: int | None = Field(None, ge=1, description="torch threads; default: all cores")


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

    @property
    def networks(self) -> int:
        """Number of networks to train."""
        return self.members if self.kind == "ensemble" else 1


class StartSettings(Table):
    """What the loop starts from."""

    file: Path = Field(
        description="one or more structures, extxyz or any file that ASE reads; relative to the settings file"
    )
    labels: LabelKeys = Field(default_factory=dict, description=_LABEL_KEYS)
    count: int = Field(8, ge=2, description="perturbed copies that are labelled first")
    displacement: float = Field(0.02, ge=0, description="uniform random shift of every coordinate, ± Å")
    strain: float = Field(0.0, ge=0, lt=0.5, description="uniform random strain of periodic cells, ± (no unit)")
    mixed_states: bool = Field(
        False,
        description="allow start structures of one composition that differ in charge, spin or initial magnetic "
        "moments, although a model cannot tell them apart",
    )


USUAL_INFO = ("charge", "spin", "multiplicity")
"""Usual keys of atoms.info that a calculator reads."""

_TAKEN = {
    *("Lattice", "Properties", "pbc"),
    *("iteration", "replica", "step", "rule", "trajectory", "label", "split", "reason", "unconstrained"),
    *("temperature", "predicted_error", "uncertainty", "max_uncertainty"),
    *("energy", "free_energy", "forces", "stress", "virial", "virials"),
}
"""Keys of atoms.info that the frames of a run have (and those of labels, with REF_ or without)."""


class ReferenceSettings(Table):
    """Who labels structures: a ready-made reference or any ASE calculator by import path."""

    calculator: str = Field(
        description="'openmm', 'lammps', 'quickff_mil53', 'tblite', 'cp2k', 'espresso', or the import path of an ASE "
        "calculator, e.g. 'ase.calculators.emt:EMT'"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of the calculator, e.g. 'openmm': pdb, forcefield, cmap; 'lammps': commands, "
        "elements, units; 'tblite': method; 'cp2k', 'espresso': launcher, threads and the program's settings; misspelt "
        "names are refused",
    )
    info: tuple[str, ...] = Field(
        USUAL_INFO,
        description="keys of atoms.info that the calculator reads: they go from the start structures to every "
        "structure that is labelled, as initial charges, initial magnetic moments, tags and masses always do",
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description='environment variables while the reference runs, e.g. {OMP_NUM_THREADS = "4"} (else 1 per worker)',
    )
    cache: str | None = Field(
        None,
        description="folder (relative to the settings file) that keeps every label and is asked before a new one is "
        "made; runs may share it",
    )
    timeout: float = Field(600.0, gt=0, description="longest time for one label, s")
    force_limit: float = Field(20.0, gt=0, description="labels with a larger |F| are rejected, eV/Å")
    energy_limit: float = Field(
        5.0,
        gt=0,
        description="labels whose energy is further than this from the median of those before it (of the same "
        "composition) are rejected, eV per atom",
    )
    min_distance: float = Field(
        0.5, ge=0, description="reject structures with atoms closer than this share of their covalent radii (no unit)"
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="standard deviation of Gaussian noise that is added to the forces, eV/Å, to study how a method "
        "takes it (the same structure always gets the same noise)",
    )

    @field_validator("info")
    @classmethod
    def _info_is_free(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name.removeprefix("REF_") in _TAKEN:
                raise ValueError(
                    f"reference.info names {name!r}, under which ubmd keeps something else; rename it in the "
                    "structures and in what reads it"
                )
        return value


class MDRampSettings(Table):
    """Temperature and pressure that change linearly over the first iterations and then stay."""

    iterations: int = Field(5, ge=1, description="iterations until the last values are reached; they hold from then on")
    temperature: tuple[float, float] | None = Field(
        None, description="first and last temperature of all replicas, K, e.g. [300.0, 600.0]"
    )
    pressure: tuple[float, float] | None = Field(
        None, description="first and last pressure of all replicas, MPa, e.g. [0.0, 250.0]"
    )

    @model_validator(mode="after")
    def _temperatures_are_positive(self) -> MDRampSettings:
        _check_each("md.ramp.temperature", self.temperature or (), above=0.0)
        return self


class MDSettings(Table):
    """The replicas' dynamics in LAMMPS (NVT: fix nve + fix langevin; NPT: fix npt, Nosé-Hoover)."""

    replicas: int = Field(8, ge=1, description="independent replicas per iteration")
    steps: int = Field(20000, ge=1, description="longest run of one replica, steps")
    timestep: float = Field(0.5, gt=0, description="time step of the dynamics, fs")
    ensemble: Literal["nvt", "npt"] = Field(
        "nvt", description="nvt: the cell, if any, stays as it is; npt: a barostat moves it (periodic structures only)"
    )
    temperature: float = Field(300.0, gt=0, description="temperature of the thermostat, K")
    temperatures: tuple[float, ...] = Field(
        (), description="temperatures that the replicas take in turn, K; default: 'temperature' for all"
    )
    damping: float = Field(
        0.51,
        gt=0,
        description="damping time of the thermostat, ps (Langevin in nvt: friction 1.96 /ps = 0.51 ps; "
        "Nosé-Hoover in npt, where 0.1 is usual)",
    )
    pressure: float = Field(0.0, description="pressure of the barostat (npt), MPa; negative: tension")
    pressures: tuple[float, ...] = Field(
        (),
        description="pressures that the replicas take in turn (npt), MPa, e.g. [250.0, -250.0] for one half each; "
        "default: 'pressure' for all",
    )
    pressure_damping: float = Field(1.0, gt=0, description="damping time of the barostat (npt), ps")
    coupling: Literal["iso", "aniso", "tri"] = Field(
        "tri",
        description="what the barostat moves (npt): iso the volume, aniso the three lengths along the axes of LAMMPS, "
        "tri lengths and angles",
    )
    cell_limit: float = Field(
        2.5,
        gt=1,
        description="a replica fails when its volume, or a length in any direction, has grown or shrunk by more than "
        "this factor, for npt (no unit)",
    )
    ramp: MDRampSettings | None = Field(None, description="temperature and pressure that change over iterations")
    frames_every: int = Field(200, ge=1, description="steps between frames that go to the pool")
    trace_every: int | None = Field(
        None,
        ge=1,
        description="steps between records of positions, cell and largest uncertainty in a file beside the frames, for "
        "autocorrelation times (10 fs or less); a multiple of bias.every; default: none",
    )
    colvars: Path | None = Field(
        None,
        description="file with a Colvars configuration (LAMMPS: fix colvars), another bias that joins the dynamics of "
        "every replica from its first step on, e.g. metadynamics; relative to the settings file; default: none",
    )
    precision: Literal["mixed", "single", "double"] = Field("mixed", description="precision of pair_style ubmd")
    ranks: int = Field(
        1, ge=1, description="MPI processes that share one replica's atoms; more than 1 pays for thousands of atoms"
    )
    timeout: float = Field(7200.0, gt=0, description="longest time for one replica, s")
    start_from: Literal["start", "labelled"] = Field(
        "start", description="replicas start from the first structure, or from newly labelled ones"
    )

    @model_validator(mode="after")
    def _conditions_fit(self) -> MDSettings:
        _check_each("md.temperatures", self.temperatures, above=0.0)
        ramp = self.ramp or MDRampSettings()
        for name in ("temperature", "pressure"):
            if getattr(self, f"{name}s") and getattr(ramp, name):
                raise ValueError(f"md.{name}s and md.ramp.{name} cannot both be set; remove one of them")
        if self.ensemble == "nvt" and (self.pressure or self.pressures or ramp.pressure):
            raise ValueError("a pressure needs a barostat: set md.ensemble = 'npt'")
        return self


class BiasRampSettings(Table):
    """Bias strengths that change linearly over the first iterations and then stay."""

    iterations: int = Field(5, ge=1, description="iterations until the last values are reached; they hold from then on")
    force: tuple[float, float] | None = Field(
        None, description="first and last bias.force (no unit), e.g. [0.1, 0.25]; replaces bias.force"
    )
    stress: tuple[float, float] | None = Field(
        None, description="first and last bias.stress (no unit); replaces bias.stress"
    )

    @model_validator(mode="after")
    def _strengths_are_not_negative(self) -> BiasRampSettings:
        _check_each("bias.ramp.force", self.force or (), least=0.0)
        _check_each("bias.ramp.stress", self.stress or (), least=0.0)
        return self


class BiasSettings(Table):
    """The uncertainty bias (fix ubmd); force = 0 and stress = 0 run plain MD with the uncertainty as a monitor."""

    force: float = Field(0.25, ge=0, description="tau, bias strength as a share of the physical forces (no unit)")
    stress: float = Field(
        0.0, ge=0, description="bias strength as a share of the physical stress, for md.ensemble = 'npt' (no unit)"
    )
    uncertainty: Literal["energy", "atomic"] = Field(
        "energy",
        description="what the bias raises: the uncertainty of the total energy, or the sum of all atomic ones (stays "
        "strong above about 1000 atoms)",
    )
    species: dict[str, float] = Field(
        default_factory=dict, description="per-element factors on tau (no unit), e.g. {H = 0.0}"
    )
    window: int = Field(100, ge=1, description="evaluations in the moving window of the bias scale")
    every: int = Field(4, ge=1, description="steps between evaluations of uncertainty and bias")
    ramp: BiasRampSettings | None = Field(None, description="bias strengths that change over iterations")

    @property
    def is_biased(self) -> bool:
        """Whether any replica of any iteration feels a bias."""
        ramp = self.ramp or BiasRampSettings()
        return any(x > 0.0 for x in (*(ramp.force or (self.force,)), *(ramp.stress or (self.stress,))))

    @property
    def has_stress(self) -> bool:
        """Whether any replica of any iteration feels a bias stress."""
        return any(x > 0.0 for x in ((self.ramp and self.ramp.stress) or (self.stress,)))


def _check_each(name: str, values: Sequence[float], above: float | None = None, least: float | None = None) -> None:
    """ValueError if one of several values is out of range."""
    for value in values:
        if (above is not None and not value > above) or (least is not None and not value >= least):
            limit = f"greater than {above:g}" if above is not None else f"at least {least:g}"
            raise ValueError(f"every value of {name} must be {limit}, not {value:g}")


class SelectionSettings(Table):
    """Which frames of the pool are labelled."""

    method: Literal["max_det", "max_dist", "max_diag", "random"] = Field(
        "max_det",
        description="batch selection rule; max_det for posterior and last-layer, max_dist for distance, "
        "max_diag for ensemble",
    )
    batch: int = Field(8, ge=1, description="structures labelled per iteration")
    noise: float = Field(
        0.0, ge=0, description="noise of max_det: 0 = determinant, lambda2 = refit with the pick (no unit)"
    )
    duplicate_tolerance: float = Field(
        1e-3, ge=0, description="feature distance below which two structures count as the same (no unit)"
    )


class LoopSettings(Table):
    """When a replica stops, when the loop stops, how labels are split."""

    labels: int = Field(512, ge=2, description="stop when the data set has this many labels")
    label_budget: int | None = Field(
        None,
        ge=2,
        description="stop when the reference was asked for this many structures, rejected ones and start structures "
        "included (not the test set); default: no limit",
    )
    threshold: float = Field(
        1.5, gt=0, description="a replica stops when max_i u_i passes this, eV/Å; inf: never, as for plain MD"
    )
    quiet_iterations: int = Field(
        3, ge=1, description="stop after this many successive iterations in which every replica reached the step limit"
    )
    stop_when_quiet: bool = Field(False, description="use the quiet_iterations rule at all")
    stop_at_plateau: bool = Field(
        False, description="stop when new labels no longer change force error and calibration factor of held-out labels"
    )
    plateau_iterations: int = Field(
        4, ge=1, description="successive iterations with new labels that stop_at_plateau looks at"
    )
    plateau_tolerance: float = Field(
        0.1, gt=0, description="largest spread over them, relative to the mean, that is a plateau (no unit)"
    )
    validation_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of labels kept for validation (early stopping) and, if calibration_share is 0, for the "
        "calibration of the uncertainty (no unit)",
    )
    calibration_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of labels that only calibrate: never trained on, not used for early stopping either, and "
        "never moved to another side; while there are none, validation labels calibrate (no unit)",
    )
    warm_start: bool = Field(True, description="train from the last model (else from scratch) in every iteration")
    warm_epochs: int = Field(200, ge=1, description="epochs of a warm start, at most")
    warm_visits: int = Field(
        1000,
        ge=0,
        description="and at most this many times the share of new labels (but at least 10): with hundreds of labels, "
        "more would overfit the old ones; 0: no such limit",
    )
    asynchronous: bool = Field(
        False,
        alias="async",
        description="also written 'async': select as soon as asynchronous_share of the replicas are done; the others "
        "go on and join the next iteration's pool. Faster where replicas differ in length; a seed no longer repeats",
    )
    asynchronous_share: float = Field(
        0.5, gt=0, le=1, description="share of the replicas that asynchronous waits for (no unit)"
    )

    @field_serializer("threshold", when_used="json")
    def _infinity_as_text(self, value: float) -> float | str:
        """JSON has no infinity, and readers of it in other languages refuse Python's."""
        return "inf" if math.isinf(value) else value


class SamplingSettings(Table):
    """Reference MD (ASE Langevin) that makes a test set."""

    temperature: float = Field(1200.0, gt=0, description="temperature of the thermostat, K")
    frames: int = Field(200, ge=1, description="frames in the test set")
    stride: int = Field(500, ge=1, description="steps between frames")
    equilibration: int = Field(2000, ge=0, description="steps before the first frame")
    timestep: float = Field(0.5, gt=0, description="time step of the dynamics, fs")
    friction: float = Field(1.96, gt=0, description="Langevin friction, 1/ps")
    trajectories: int = Field(2, ge=1, description="independent trajectories that share the frames")
    seed: int = Field(12345, ge=0, description="fixed seed: the test set does not depend on the run's seed")


class TestSettings(Table):
    """A held-out test set: a file, or reference MD; never trained on."""

    __test__: ClassVar[bool] = False  # pytest would collect it by its name

    file: Path | None = Field(None, description="extxyz with labels; made by 'sampling' there if it does not exist")
    labels: LabelKeys = Field(default_factory=dict, description=_LABEL_KEYS)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings, description="how to make the file")


ORDERS = ("2", "3", "4", "5", "6")  # of force constants, as keys of a table


class CrystalSettings(Table):
    """A force-constant potential: energy and forces as a polynomial of the displacements from an ideal crystal."""

    structure: Path = Field(
        description="file of the ideal crystal, its primitive cell or any supercell of it; relative to the settings "
        "file"
    )
    cutoffs: dict[int, float] = Field(
        description="largest distance inside a cluster by order, Å, e.g. {2 = 5.4, 3 = 4.0, 4 = 4.0}; orders 2 to 6, "
        "none left out"
    )
    max_displacement: float | None = Field(
        None,
        gt=0,
        description="LAMMPS stops when an atom is further than this from its site, Å; default: 0.4 of the shortest "
        "distance between sites",
    )
    decay: float | None = Field(
        None,
        gt=0,
        description="length over which force constants are expected to fall by a factor e with the size of their "
        "cluster, Å: for labels of a box shorter than twice a cutoff, where a pair and its periodic images look alike; "
        "default: no such expectation",
    )
    energies: bool = Field(False, description="fit the energies of the labels too, not only their forces")
    tolerance: float = Field(
        1e-5,
        gt=0,
        description="how far the crystal may be from its symmetry, Å; above 1e-5 it is moved onto it first, e.g. 1e-3 "
        "for a file with 4 decimals",
    )
    caution: float = Field(
        0.5,
        ge=0,
        description="hyperprior that keeps an order the labels say nothing about from being switched off; 0: the bare "
        "evidence (no unit)",
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
                f"crystal.cutoffs lacks order {missing[0]}; give every order from 2 to the highest one wanted a cutoff "
                "in Å"
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


class VariablesSettings(Table):
    """Collective variables that the report counts coverage in."""

    torsions: dict[str, tuple[int, int, int, int]] = Field(
        default_factory=dict, description="name -> four atom indices (from 0) of a torsion, e.g. phi = [4, 6, 8, 14]"
    )


class WorkerSettings(Table):
    """Where labels and replicas run. Nothing here changes a result: a run may go on with other workers."""

    processes: int | None = Field(
        None,
        ge=1,
        description="tasks at the same time (parsl: per node); default: one per core that may be used",
    )
    executor: Literal["pebble", "parsl", "executorlib"] = Field(
        "pebble",
        description="pebble: processes of this machine; parsl (pip install 'ubmd[parallel]'): jobs of a cluster, whose "
        "nodes share a file system; executorlib: inside one job, through an unprotected port",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of parsl's HighThroughputExecutor (and in a table 'provider' its name, launcher "
        "and keyword arguments), or of executorlib's SingleNodeExecutor or SlurmJobExecutor ('name'); not for pebble",
    )
    retries: int = Field(
        1,
        ge=0,
        description="how often a task is tried again whose process crashed (then it is rejected) or was lost by a "
        "fault of the machine or cluster (then it is postponed); never after a time-out",
    )


# Selection methods that make sense with each kind of uncertainty, the one that the method was published with first.
FITTING_METHODS = {
    "posterior": ("max_det", "max_dist", "max_diag", "random"),
    "last-layer": ("max_det", "max_dist", "max_diag", "random"),
    "distance": ("max_dist", "max_diag", "random"),
    "ensemble": ("max_diag", "random"),
}


class RunSettings(Table):
    """Everything that `ubmd run` needs: one settings file is one run."""

    run_dir: Path = Field(description="folder of the run; relative to the working directory")
    seed: int = Field(0, ge=0, description="seed of the run; the same seed repeats the run")
    start: StartSettings
    reference: ReferenceSettings
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    uncertainty: UncertaintySettings = Field(default_factory=UncertaintySettings)
    md: MDSettings = Field(default_factory=MDSettings)
    bias: BiasSettings = Field(default_factory=BiasSettings)
    selection: SelectionSettings = Field(default_factory=SelectionSettings)
    loop: LoopSettings = Field(default_factory=LoopSettings)
    test: TestSettings | None = None
    variables: VariablesSettings = Field(default_factory=VariablesSettings)
    workers: WorkerSettings = Field(default_factory=WorkerSettings)

    @model_validator(mode="after")
    def _labels_cover_start(self) -> RunSettings:
        for name, limit in (("labels", self.loop.labels), ("label_budget", self.loop.label_budget)):
            if limit is not None and limit < self.start.count:
                raise ValueError(f"loop.{name} = {limit} is less than start.count = {self.start.count}")
        return self

    @model_validator(mode="after")
    def _shares_leave_something_to_train_on(self) -> RunSettings:
        held_out = self.loop.validation_share + self.loop.calibration_share
        if held_out >= 1.0:
            raise ValueError(
                f"loop.validation_share and loop.calibration_share add up to {held_out:g}; they must leave a share "
                "for training"
            )
        return self

    @model_validator(mode="after")
    def _bias_stress_has_a_barostat(self) -> RunSettings:
        if self.bias.has_stress and self.md.ensemble != "npt":
            raise ValueError("a bias stress needs a barostat: set md.ensemble = 'npt', or bias.stress = 0")
        return self

    @model_validator(mode="after")
    def _traces_meet_evaluations(self) -> RunSettings:
        if self.md.trace_every and self.md.trace_every % self.bias.every:
            raise ValueError(
                f"md.trace_every = {self.md.trace_every} must be a multiple of bias.every = {self.bias.every}: "
                "uncertainties are known at those steps only"
            )
        return self

    @model_validator(mode="after")
    def _selection_fits_uncertainty(self) -> RunSettings:
        kind, method = self.uncertainty.kind, self.selection.method
        if method not in FITTING_METHODS[kind]:
            wanted = FITTING_METHODS[kind][0]
            raise ValueError(
                f"selection.method = '{method}' does not go with uncertainty.kind = '{kind}'; use '{wanted}'"
            )
        return self

    def epochs(self, labels: float, new: float | None) -> int:
        """Epochs of a training on so many labels, of which ``new`` are new to the last model; None: from scratch."""
        if new is None:
            return self.training.epochs
        most, visits = self.loop.warm_epochs, self.loop.warm_visits
        return min(most, max(_FEWEST_WARM_EPOCHS, round(visits * new / labels))) if visits else most


class TrainSettings(Table):
    """Everything that `ubmd train` needs."""

    training_file: Path = Field(description="extxyz with labels; relative to the settings file")
    validation_file: Path | None = Field(None, description="extxyz with labels; default: split from training_file")
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="share split off when there is no validation_file (no unit)"
    )
    labels: LabelKeys = Field(default_factory=dict, description=_LABEL_KEYS.replace("its", "their", 1))
    output_dir: Path = Field(description="folder for log, picture and model.pt; relative to the working directory")
    seed: int = Field(0, ge=0, description="seed of the initial weights, the split and the order of mini-batches")
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    uncertainty: UncertaintySettings = Field(default_factory=UncertaintySettings)
    crystal: CrystalSettings | None = Field(
        None, description="a force-constant potential of a crystal instead of a network; default: a network"
    )

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
                f"uncertainty.{unused[0]} has no effect on a force-constant potential; remove it ([crystal] goes with "
                "alpha and atoms_by alone)"
            )
        return self


CRYSTAL_UNCERTAINTY = {"alpha", "atoms_by"}  # keys of [uncertainty] that force-constant potentials use


def load_settings(path: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a TOML settings file; ``overrides`` are ``table.key=value`` strings with TOML values.

    Raises:
        SettingsError: one sentence that names the exact key and, for a typo, the nearest valid name.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"There is no settings file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as a settings file: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}.") from None
    return make_settings(kind, values, overrides, str(path))


def make_settings(kind: type[T], values: dict[str, Any], overrides: Sequence[str] = (), source: str = "settings") -> T:
    """Settings from a dictionary (changed by the overrides); ``source`` names its origin in error messages.

    Raises:
        SettingsError: as in `load_settings`.
    """
    for override in overrides:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_explain(error, kind)}") from None


def _override(values: dict[str, Any], override: str) -> None:
    """Set one ``table.key=value`` in a nested dictionary; a value that is not TOML is taken as text."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise SettingsError(f"--set needs key=value, got {override!r}.")
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise SettingsError(f"--set {override}: '{table}' is a value, not a table.")
    try:
        values[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[last] = text.strip()


def _explain(error: ValidationError, kind: type[Table]) -> str:
    """One sentence for the first validation error, with the nearest valid key for unknown ones."""
    # a typo explains a missing key better than the missing key does
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {_suggestion(kind, location)}"
    if location and location[-1].isdigit():  # one of several values, e.g. the atoms of a torsion
        key = ".".join(location[:-1])
        if first["type"] == "missing":
            return f"'{key}' has too few values (got {first['input']!r})."
    if first["type"] == "missing":
        return f"the key '{key}' is missing{_purpose(kind, location)}."
    if first["type"] == "model_type":
        return f"'{key}' is a table: write its keys below a line [{key}] (got {first['input']!r})."
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):  # a rule on several keys, which its message names
        return f"{message}."
    return f"'{key}': {message} (got {first['input']!r})." if location else f"{message}."


def _suggestion(kind: type[Table], location: list[str]) -> str:
    """What the user may have meant: a similar key of the same table, the same key of another one, or any of these."""
    name, names = location[-1], _fields_at(kind, location[:-1])
    same = [path for path in _paths(kind) if path.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name, names, n=1)
    if near or not same:
        near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        return f"did you mean '{near[0]}'?" if near else "this table has no keys."
    return f"did you mean {' or '.join(repr(path) for path in same[:3])}?"


def _purpose(kind: type[Table], location: list[str]) -> str:
    """The description of a missing key, in brackets."""
    try:
        table = _table_at(kind, location[:-1])
        text = table.model_fields[location[-1]].description or (_table_at(kind, location).__doc__ or "").rstrip(".")
    except (KeyError, StopIteration):
        return ""
    return f" ({text})" if text else ""


def _fields_at(kind: type[Table], location: list[str]) -> list[str]:
    """Field names of the table at a location inside the settings."""
    return list(_table_at(kind, location).model_fields)


def _table_at(kind: type[Table], location: list[str]) -> type[Table]:
    """The table at a location inside the settings."""
    for part in location:
        kind = next(iter(_tables_of(kind.model_fields[part].annotation)))
    return kind


def _tables_of(annotation: Any) -> list[type[Table]]:
    """Tables that a field may hold."""
    return [c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, Table)]


def _paths(kind: type[Table], prefix: str = "") -> list[str]:
    """Dotted names of all keys and tables."""
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(prefix + name)
        for table in _tables_of(field.annotation)[:1]:
            paths += _paths(table, f"{prefix}{name}.")
    return paths
