"""Settings of a dynamic run: a TOML file with a [dynamic] table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ubmd.devices import CPU, Device
from ubmd.errors import SettingsError
from ubmd.settings import (
    CRYSTAL_UNCERTAINTY,
    CrystalSettings,
    ModelSettings,
    ReferenceSettings,
    Table,
    TestSettings,
    TrainingSettings,
    UncertaintySettings,
    WorkerSettings,
)
from ubmd.settings.labels import LABELS, LabelSources, gather_labels
from ubmd.settings.marks import ELSEWHERE, LATE, NOTHING, before
from ubmd.settings.potentials import check_mode


class DynamicStartSettings(Table):
    """The simulation box, and the first labels."""

    file: Annotated[Path | None, NOTHING] = Field(
        None,
        description="box of the dynamics, extxyz or any file that ASE reads; relative to the settings file; default: "
        "crystal.structure",
    )
    repeat: tuple[int, int, int] = Field(
        (1, 1, 1), description="how often the box is repeated along its vectors, e.g. [2, 2, 2]"
    )
    count: int = Field(1, ge=1, description="displaced copies that are labelled first (networks: at least 2)")
    displacement: float = Field(0.01, gt=0, description="standard deviation of their Gaussian displacements, Å")

    @model_validator(mode="after")
    def _repeats(self) -> DynamicStartSettings:
        if min(self.repeat) < 1:
            raise ValueError(f"start.repeat needs three numbers of at least 1, not {list(self.repeat)}")
        return self


class TriggerSettings(Table):
    """When a trajectory requests a reference calculation."""

    rule: Literal["average", "absolute", "history"] = Field(
        "average",
        description="average: error above 'maximum', or above 'factor' times its average along the trajectory of the "
        "current model; absolute: above 'threshold'; history: above 'factor' times the mean error right after the "
        "last refits",
    )
    maximum: float | None = Field(None, gt=0, description="average: largest allowed error, eV/Å; default 0.14")
    factor: float | None = Field(None, gt=0, description="average, history: see rule (no unit); default √3, 1")
    window: int | None = Field(None, ge=1, description="average: checks that are averaged; default 1000")
    wait: int | None = Field(
        None, ge=1, description="average: checks after a refit before errors are compared with the average; default 10"
    )
    threshold: float | None = Field(None, gt=0, description="absolute: largest allowed error, eV/Å")
    start: float | None = Field(
        None, gt=0, description="history: threshold until there have been enough refits, eV/Å; default 0.002"
    )
    history: int | None = Field(None, ge=1, description="history: refits that are averaged; default 10")
    floor: float = Field(
        1.0, ge=0, description="no request while the error is below this times the noise of the labels (no unit)"
    )
    extrapolation: Annotated[float | None, LATE] = Field(
        None,
        gt=0,
        description="force constants: also request a label where the displacements of two neighbours differ by more "
        "than this times the largest difference in all labels (at least 0.2 of the shortest distance), 'wait' checks "
        "after a refit at the earliest, e.g. 1.15 for soft crystals (no unit); default: no such rule",
    )

    @model_validator(mode="after")
    def _arguments_fit_the_rule(self) -> TriggerSettings:
        allowed = {
            "average": {"maximum", "factor", "window", "wait"},
            "absolute": {"threshold"},
            "history": {"start", "history", "factor"},
        }[self.rule]
        given = set(self.arguments())
        if given - allowed:
            name, own = min(given - allowed), ", ".join(sorted(allowed))
            raise ValueError(f"dynamic.trigger.{name} has no effect with rule = '{self.rule}', which takes {own}")
        if self.rule == "absolute" and self.threshold is None:
            raise ValueError("dynamic.trigger.threshold is missing: rule = 'absolute' needs it, eV/Å")
        return self

    def arguments(self) -> dict[str, Any]:
        """Those of the rule that are set."""
        values = self.model_dump(exclude={"rule", "floor", "extrapolation"})
        return {name: value for name, value in values.items() if value is not None}


class ConvergenceSettings(Table):
    """Signals of convergence, none of which needs an extra label."""

    stop: Annotated[bool, NOTHING] = Field(True, description="stop when all three signals hold")
    determined: float = Field(
        0.95, gt=0, lt=1, description="share γ/P of the parameters that labels determine (no unit)"
    )
    noise: float = Field(
        0.5, gt=0, description="rms predicted error of a fresh trajectory, relative to the noise of labels (no unit)"
    )
    gain: float = Field(
        0.1, gt=0, description="predicted drop of the mean error if its best frame were labelled (no unit)"
    )
    steps: Annotated[int, NOTHING] = Field(
        200, ge=1, description="steps since the last refit, over all replicas, before the signals can stop the run"
    )


class DynamicSettings(Table):
    """Trajectories, requests for labels, and when to stop."""

    temperatures: tuple[float, ...] = Field((300.0,), min_length=1, description="temperatures of the replicas, K")
    replicas: int = Field(1, ge=1, description="trajectories at each temperature")
    steps: Annotated[int, NOTHING] = Field(20000, ge=1, description="steps of each trajectory")
    timestep: float = Field(1.0, gt=0, description="time step, fs")
    damping: float = Field(0.1, gt=0, description="damping time of the Langevin thermostat, ps")
    check_every: int = Field(1, ge=1, description="steps between checks of the error")
    segment: int = Field(
        1000,
        ge=1,
        description="maximum steps of a segment: all replicas wait there for each other, even without a request",
    )
    labels: Annotated[int, NOTHING] = Field(
        100,
        ge=1,
        description="stop after this many reference calculations, rejected ones and start structures included (not "
        "the test set)",
    )
    batch: Annotated[int | None, ELSEWHERE] = Field(
        None,
        ge=1,
        description="maximum labels per round: when more replicas request one, those that lower the predicted error "
        "most; default: all",
    )
    calibrate: Annotated[bool, ELSEWHERE] = Field(
        False,
        description="multiply predicted errors by the conformal factor of the newest labels (each predicted before it "
        "was learnt; a share of 1 - uncertainty.alpha is covered)",
    )
    calibration_window: Annotated[int, ELSEWHERE] = Field(
        20, ge=1, description="number of newest labels that the conformal factor is computed from"
    )
    frames: int = Field(8, ge=1, description="frames per segment that the signals of convergence use")
    warm_epochs: Annotated[int, ELSEWHERE] = Field(200, ge=1, description="networks: epochs of a refit")
    precision: Literal["mixed", "single", "double"] = Field(
        "mixed",
        description="precision of pair_style ubmd (force constants are always in double, and models that run in one "
        "precision only keep it)",
    )
    device: Annotated[Device, NOTHING] = Field(
        "cpu",
        description="where pair_style ubmd runs the model: cpu, cuda (the first GPU) or cuda:n (GPU number n, from 0); "
        "force constants: cpu",
    )
    timeout: Annotated[float, NOTHING] = Field(7200.0, gt=0, description="time limit of a segment, s")
    trigger: TriggerSettings = Field(default_factory=TriggerSettings)
    convergence: Annotated[ConvergenceSettings, NOTHING] = Field(default_factory=ConvergenceSettings)

    @model_validator(mode="after")
    def _values_fit(self) -> DynamicSettings:
        for temperature in self.temperatures:
            if not temperature > 0.0:
                raise ValueError(f"every value of dynamic.temperatures must be greater than 0, not {temperature:g}")
        for name in ("steps", "segment"):
            if getattr(self, name) % self.check_every:
                raise ValueError(
                    f"dynamic.{name} = {getattr(self, name)} must be a multiple of dynamic.check_every = "
                    f"{self.check_every}"
                )
        return self

    def temperature_of(self, replica: int) -> float:
        """Temperature of a replica, K: they take the temperatures in turn."""
        return self.temperatures[replica % len(self.temperatures)]

    @property
    def trajectories(self) -> int:
        """Number of replicas at all temperatures."""
        return self.replicas * len(self.temperatures)


class DynamicBiasSettings(Table):
    """A bias towards large errors (fix ubmd), evaluated at every check; without this table there is none."""

    force: float = Field(0.25, gt=0, description="tau, bias strength as a share of the physical forces (no unit)")
    species: dict[str, float] = Field(
        default_factory=dict, description="per-element factors on tau (no unit), e.g. {H = 0.0}"
    )
    window: int = Field(
        10, ge=1, description="checks in the moving window of the bias scale; there is no bias before it is full"
    )


class DynamicRunSettings(Table):
    """Everything that `ubmd run` needs for dynamic training: one settings file is one run."""

    run_dir: Annotated[Path, NOTHING] = Field(description="folder of the run; relative to the working directory")
    seed: int = Field(0, ge=0, description="seed of the run; the same seed repeats the run")
    labels: Annotated[LabelSources, NOTHING] = Field(default_factory=dict, description=LABELS)
    crystal: CrystalSettings | None = Field(None, description="a force-constant potential; default: a network")
    model: ModelSettings | None = Field(None, description="the network, if there is no [crystal]")
    training: TrainingSettings | None = Field(None, description="training of the network")
    uncertainty: UncertaintySettings = Field(default_factory=UncertaintySettings)
    start: DynamicStartSettings = Field(default_factory=DynamicStartSettings)
    reference: ReferenceSettings
    dynamic: DynamicSettings
    bias: DynamicBiasSettings | None = None
    test: Annotated[TestSettings | None, NOTHING] = None
    workers: Annotated[WorkerSettings, NOTHING] = Field(default_factory=WorkerSettings)

    @model_validator(mode="before")
    @classmethod
    def _one_table_of_labels(cls, values: Any) -> Any:
        return gather_labels(values)

    @model_validator(mode="before")
    @classmethod
    def _networks_have_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("crystal") is None:
            return {"model": {}, "training": {}} | values
        return values

    @model_validator(mode="after")
    def _one_kind_of_model(self) -> DynamicRunSettings:
        if self.crystal is None:
            if self.start.file is None:
                raise ValueError("the key 'start.file' is missing: the box that a network's dynamics start from")
            if self.start.count < 2:
                raise ValueError("start.count must be at least 2 for a network: one trains, one validates")
            if self.uncertainty.kind == "ensemble":
                raise ValueError("dynamic training has one network: use an uncertainty.kind other than 'ensemble'")
            if self.dynamic.trigger.extrapolation is not None:
                raise ValueError(
                    "dynamic.trigger.extrapolation is for force constants ([crystal]); remove it for a network"
                )
            return self
        for name in ("model", "training"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"[{name}] is for networks and [crystal] trains a force-constant potential; remove one of them"
                )
        if self.dynamic.device != CPU:
            raise ValueError(
                f"dynamic.device = '{self.dynamic.device}' is for networks; force constants run on the CPU: remove it"
            )
        default, fields = UncertaintySettings(), UncertaintySettings.model_fields
        for name in sorted(set(fields) - CRYSTAL_UNCERTAINTY):
            if getattr(self.uncertainty, name) not in (getattr(default, name), before(fields[name])):
                raise ValueError(f"uncertainty.{name} has no effect on a force-constant potential; remove it")
        return self

    @model_validator(mode="after")
    def _mode_is_of_the_kind(self) -> DynamicRunSettings:
        if self.model is not None and self.training is not None:
            check_mode(self.model, self.training)
        return self

    @model_validator(mode="after")
    def _labels_cover_start(self) -> DynamicRunSettings:
        if self.dynamic.labels < self.start.count:
            raise ValueError(f"dynamic.labels = {self.dynamic.labels} is less than start.count = {self.start.count}")
        return self


def box_file(settings: DynamicRunSettings, base: Path) -> Path:
    """File of the box.

    Raises:
        SettingsError: it is not there.
    """
    if settings.start.file is None:
        assert settings.crystal is not None
        return settings.crystal.structure_file(base)
    path = base / settings.start.file
    if not path.is_file():
        raise SettingsError(f"start.file: there is no file {path} (the path is relative to the settings file).")
    return path
