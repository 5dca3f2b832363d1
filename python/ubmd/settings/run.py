"""Settings of every stage: one TOML file per run, one pydantic model per table.

Every field states its unit in its description; ``ubmd schema`` prints the JSON schema and
``ubmd init`` a commented template made from the same descriptions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, field_serializer, model_validator

from ubmd.settings.labels import LABELS, LabelSources, gather_labels
from ubmd.settings.marks import FIRST_LABELS, LATE, NOTHING, late
from ubmd.settings.md import BiasSettings, MDSettings
from ubmd.settings.potentials import ModelSettings, TrainingSettings, UncertaintySettings, check_mode
from ubmd.settings.reference import ReferenceSettings, TestSettings
from ubmd.settings.table import Table

_FEWEST_WARM_EPOCHS = 10  # however few of the labels are new


class StartSettings(Table):
    """What the loop starts from."""

    file: Annotated[Path | None, NOTHING] = Field(
        None,
        description="one or more structures: extxyz, any file that ASE reads, or a folder of deepmd/npy; relative to "
        "the settings file; default: those of start.labels",
        examples=["start.extxyz"],
    )
    labels: Path | None = Field(
        None,
        description="labelled structures that you already have; relative to the settings file; the run begins with "
        "them instead of labelling copies of its own",
    )
    model: Path | None = Field(
        None,
        description="the first training starts from this model (model.pt, weights.pt, checkpoint.pt, or the folder of "
        "a run or training) instead of random weights; relative to the settings file",
    )
    trust: Annotated[bool, NOTHING] = Field(
        False,
        description="begin with start.labels without labelling some of them again, which finds labels of another "
        "reference",
    )
    energy_shifts: dict[str, FiniteFloat] = Field(
        default_factory=dict,
        description="eV per atom of an element, added to the energies of start.labels whose zero is another than the "
        "reference's, e.g. {H = 0.4, O = -1.3}",
    )
    count: int = Field(8, ge=0, description="perturbed copies that are labelled first; with start.labels 0 if not set")
    displacement: float = Field(0.02, ge=0, description="uniform random shift of every coordinate, ± Å")
    strain: float = Field(0.0, ge=0, lt=0.5, description="uniform random strain of periodic cells, ± (no unit)")
    mixed_states: bool = Field(
        False,
        description="allow start structures of one composition that differ in charge, spin or initial magnetic "
        "moments, although a model cannot tell them apart",
    )

    @model_validator(mode="before")
    @classmethod
    def _labels_need_no_copies(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("labels") and "count" not in values:
            return {**values, "count": 0}
        return values

    @model_validator(mode="after")
    def _starts_from_something(self) -> StartSettings:
        if self.file is None and self.labels is None:
            raise ValueError("the key 'start.file' is missing: structures to start from (or start.labels: with labels)")
        if self.labels is None and self.count < 2:
            raise ValueError("start.count must be at least 2: one label trains, one validates")
        for key in ("trust", "energy_shifts") if self.labels is None else ():
            if getattr(self, key):
                raise ValueError(f"start.{key} is about start.labels, which is not set")
        return self

    @property
    def source(self) -> Path:
        """The file with the structures that MD starts from."""
        file = self.file or self.labels
        assert file is not None  # validated
        return file


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
    random: Annotated[int, LATE] = Field(
        0,
        ge=0,
        description="frames of each batch of 8 or more that are drawn at random from the pool: the report shows how "
        "their errors differ from those of chosen frames",
    )

    @model_validator(mode="after")
    def _some_are_chosen(self) -> SelectionSettings:
        if self.random >= self.batch and self.method != "random":
            raise ValueError(f"random ({self.random}) must be less than batch ({self.batch}): else nothing is chosen")
        return self


class LoopSettings(Table):
    """When a replica stops, when the loop stops, how labels are split."""

    labels: Annotated[int, NOTHING] = Field(512, ge=2, description="stop when the data set has this many labels")
    label_budget: Annotated[int | None, NOTHING] = Field(
        None,
        ge=2,
        description="stop after this many reference calculations, rejected ones and start structures included (not "
        "the test set); default: no limit",
    )
    threshold: float = Field(
        1.5, gt=0, description="a replica stops when max_i u_i passes this, eV/Å; inf: never, as for plain MD"
    )
    quiet_iterations: Annotated[int, NOTHING] = Field(
        3, ge=1, description="stop after this many consecutive iterations in which every replica reached the step limit"
    )
    stop_when_quiet: Annotated[bool, NOTHING] = Field(False, description="whether to use the quiet_iterations rule")
    stop_at_plateau: Annotated[bool, NOTHING] = Field(
        False, description="stop when new labels no longer change force error and calibration factor of held-out labels"
    )
    plateau_iterations: Annotated[int, NOTHING] = Field(
        4, ge=1, description="consecutive iterations with new labels that stop_at_plateau considers"
    )
    plateau_tolerance: Annotated[float, NOTHING] = Field(
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
        "never moved to another split; while there are none, validation labels calibrate (no unit)",
    )
    calibrate_on_new: Annotated[bool, late(False)] = Field(
        True,
        description="calibrate also on the errors that new labels had under the model that selected them, those of "
        "frames drawn at random (selection.random) excepted; then calibration_share takes no more labels once these "
        "are enough for the confidence (19 for 95 %)",
    )
    half_life: Annotated[float, LATE] = Field(
        3.0,
        gt=0,
        description="iterations after which such an error counts half, because the model changes (no unit)",
    )
    warm_start: bool = Field(True, description="train from the last model (else from scratch) in every iteration")
    warm_epochs: int = Field(200, ge=1, description="epochs of a warm start, at most")
    warm_visits: int = Field(
        1000,
        ge=0,
        description="epochs of a warm start are also at most this many times the share of new labels (but at least "
        "10): with hundreds of labels, more would overfit the old ones; 0: no such limit",
    )
    asynchronous: bool = Field(
        False,
        alias="async",
        description="also written 'async': select as soon as asynchronous_share of the replicas are done; the others "
        "continue and join the next iteration's pool. Faster where replicas differ in length, but not reproducible",
    )
    asynchronous_share: float = Field(
        0.5, gt=0, le=1, description="share of the replicas that asynchronous waits for (no unit)"
    )
    keep_models: Annotated[int | None, NOTHING] = Field(
        None,
        ge=1,
        description="model files and weights of so many newest iterations are kept (model.pt of the run always is); "
        "default: of all",
    )

    @field_serializer("threshold", when_used="json")
    def _infinity_as_text(self, value: float) -> float | str:
        """JSON has no infinity, and JSON readers in other languages reject Python's."""
        return "inf" if math.isinf(value) else value


class VariablesSettings(Table):
    """Collective variables that the report counts coverage in."""

    torsions: dict[str, tuple[int, int, int, int]] = Field(
        default_factory=dict, description="name -> four atom indices (from 0) of a torsion, e.g. phi = [4, 6, 8, 14]"
    )


class WorkerSettings(Table):
    """Where labels and replicas run. Nothing here changes a result: a run may be resumed with other workers."""

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
        description="how often a task is retried if its process crashed (afterwards it is rejected) or was lost by a "
        "fault of the machine or cluster (afterwards it is postponed); never after a time-out",
    )


# Selection methods that make sense with each kind of uncertainty; first the one that it was published with.
FITTING_METHODS = {
    "posterior": ("max_det", "max_dist", "max_diag", "random"),
    "last-layer": ("max_det", "max_dist", "max_diag", "random"),
    "distance": ("max_dist", "max_diag", "random"),
    "ensemble": ("max_diag", "random"),
}


class RunSettings(Table):
    """Everything that `ubmd run` needs: one settings file is one run."""

    run_dir: Annotated[Path, NOTHING] = Field(description="folder of the run; relative to the working directory")
    seed: int = Field(0, ge=0, description="seed of the run; the same seed repeats the run")
    labels: Annotated[LabelSources, NOTHING] = Field(default_factory=dict, description=LABELS)
    start: Annotated[StartSettings, FIRST_LABELS]
    reference: ReferenceSettings
    model: ModelSettings = Field(default_factory=ModelSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    uncertainty: UncertaintySettings = Field(default_factory=UncertaintySettings)
    md: MDSettings = Field(default_factory=MDSettings)
    bias: BiasSettings = Field(default_factory=BiasSettings)
    selection: SelectionSettings = Field(default_factory=SelectionSettings)
    loop: LoopSettings = Field(default_factory=LoopSettings)
    test: Annotated[TestSettings | None, NOTHING] = None
    variables: Annotated[VariablesSettings, NOTHING] = Field(default_factory=VariablesSettings)
    workers: Annotated[WorkerSettings, NOTHING] = Field(default_factory=WorkerSettings)

    @model_validator(mode="before")
    @classmethod
    def _one_table_of_labels(cls, values: Any) -> Any:
        return gather_labels(values)

    @model_validator(mode="after")
    def _mode_is_of_the_kind(self) -> RunSettings:
        check_mode(self.model, self.training)
        return self

    @model_validator(mode="after")
    def _labels_cover_start(self) -> RunSettings:
        for name, limit in (("labels", self.loop.labels), ("label_budget", self.loop.label_budget)):
            if limit is not None and limit < self.start.count:
                raise ValueError(f"loop.{name} = {limit} is less than start.count = {self.start.count}")
        return self

    @model_validator(mode="after")
    def _start_model_is_kept(self) -> RunSettings:
        if self.start.model is not None and not self.loop.warm_start:
            raise ValueError("start.model needs loop.warm_start = true: else every iteration begins anew")
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
                f"selection.method = '{method}' cannot be used with uncertainty.kind = '{kind}'; use '{wanted}'"
            )
        return self

    def epochs(self, labels: float, new: float | None) -> int:
        """Epochs of a training on so many labels, of which ``new`` are new to the last model; None: from scratch."""
        if new is None:
            return self.training.epochs
        most, visits = self.loop.warm_epochs, self.loop.warm_visits
        return min(most, max(_FEWEST_WARM_EPOCHS, round(visits * new / labels))) if visits else most


def conditions(settings: RunSettings) -> str:
    """Ensemble, temperature, pressure and bias in a few words."""
    md, bias = settings.md, settings.bias
    heat, press = (md.ramp.temperature, md.ramp.pressure) if md.ramp else (None, None)
    force, stress = (bias.ramp.force, bias.ramp.stress) if bias.ramp else (None, None)
    parts = [f"{md.ensemble.upper()} at {_range(md.temperature, ' K', md.temperatures, heat)}"]
    if md.ensemble == "npt":
        parts[0] += f" and {_range(md.pressure, ' MPa', md.pressures, press)}"
    if md.colvars is not None:
        parts[0] += f" with {md.colvars.name}"
    if not bias.is_biased:
        return parts[0] + (", no uncertainty bias" if md.colvars else ", no bias (plain MD)")
    parts.append(f"bias force {_range(bias.force, '', (), force)}")
    if bias.has_stress:
        parts.append(f"bias stress {_range(bias.stress, '', (), stress)}")
    return ", ".join(parts)


def _range(value: float, unit: str, several: Sequence[float], ramp: Sequence[float] | None) -> str:
    """'300 K', '300 and 600 K (in turn)' or '300 to 600 K (ramped)'."""
    if ramp:
        return f"{ramp[0]:g} to {ramp[1]:g}{unit} (ramped)"
    if len(set(several)) > 1:
        return " and ".join(f"{x:g}" for x in several) + f"{unit} (in turn)"
    return f"{(*several, value)[0]:g}{unit}"
