"""What runs write down for others to read: entries of history.json, and events of events.jsonl.

One entry per finished iteration (active-learning loop) or round (dynamic run). Keys that do not apply are left out;
files of earlier versions may lack some. ``ubmd schema history`` prints this as JSON schema.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ubmd.lammps.engine import PieceResult, ReplicaResult


class Record(BaseModel):
    """Something that is written down; unknown keys are errors of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """JSON values of the keys that were given, in the order of the declaration."""
        return self.model_dump(mode="json", exclude_unset=True)


class Ending(Record):
    """Why a run has ended."""

    rule: str = Field(description="stop rule that holds")
    reason: str = Field(description="one sentence")
    evidence: dict[str, Any] = Field(default_factory=dict, description="the numbers that the rule saw")


# ------------------------------------------------------------------------------------------ loop


class Errors(Record):
    """Errors of a model on labelled structures."""

    energy_rmse_mev_per_atom: float = Field(description="root mean square error, meV/atom")
    force_rmse: float = Field(description="of force components, eV/Å")
    stress_rmse_mpa: float | None = Field(None, description="of stress components, MPa; where there are stress labels")
    structures: int = Field(description="number of structures")


class Calibration(Record):
    """Conformal factors of a model, and the shares of errors below u that so few structures can promise."""

    energy_factor: float
    force_factor: float
    energy_attainable: float
    force_attainable: float


class _Origin(BaseModel):
    iteration: int | None = Field(None, description="iteration that a replica began in, if it is an earlier one")


class Replica(ReplicaResult, _Origin):
    """How a replica ended."""


class IterationEntry(Record):
    """An iteration of the active-learning loop."""

    iteration: int = Field(description="0, 1, ...")
    labels: int = Field(description="labels that this iteration's model was trained, validated and calibrated on")
    md_steps: int = Field(description="MD steps of all replicas so far")
    train: Errors = Field(description="on labels that the model was trained on")
    valid: Errors = Field(description="on labels that stopped the training early")
    calib: Errors | None = Field(None, description="on labels that only calibrate, if there are any")
    test: Errors | None = Field(None, description="on the test set, if there is one")
    calibration: Calibration | None = Field(None, description="factors of the uncertainties")
    coverage: float | None = Field(description="share of the square of the first two torsions visited so far")
    max_u: float | None = Field(description="largest atomic uncertainty of this iteration's frames, eV/Å")
    replicas: list[Replica] = Field(description="those that ended in this iteration")
    seconds: dict[str, float] = Field(description="wall time by stage, s")
    ended: Ending | None = Field(None, description="only in the last entry of a finished run")


# ------------------------------------------------------------------------------------------ dynamic runs


class Request(Record):
    """A structure that a trajectory asked a label for."""

    label: int | None = Field(None, description="number in the data set; null if it was rejected")
    replica: int
    temperature: float | None = Field(description="K; null for start labels")
    step: int = Field(description="of the replica's trajectory")
    rule: str = Field(description="'start', 'absolute', 'average', 'history' or 'guard'")
    threshold: float | None = Field(description="that was passed, eV/Å; null for start and guard")
    rejected: str = Field("", description="why it has no label")
    error_before: float | None = Field(description="predicted by the model that had not seen it, eV/Å")
    true_before: float | None = Field(description="largest |ΔF| of a component with that model, eV/Å")
    rms_before: float | None = Field(description="root mean square ΔF with that model, eV/Å")
    drop: float | None = Field(None, description="predicted relative drop of the mean error by learning it")


class Learnt(Request):
    """A label that a round's model is the first to know."""

    error_after: float = Field(description="predicted by this round's model, eV/Å")
    true_after: float = Field(description="largest |ΔF| of a component with it, eV/Å")
    rms_after: float = Field(description="root mean square ΔF with it, eV/Å")


class Fit(Record):
    """A model of a dynamic run."""

    noise: float = Field(description="1/sqrt(β) of the forces, eV/Å; 0 for networks")
    alpha: dict[str, float] = Field(default_factory=dict, description="precision of the prior by order")
    beta: dict[str, float] = Field(default_factory=dict, description="precision of the labels by kind")
    gamma: dict[str, float] = Field(default_factory=dict, description="determined parameters by order")
    parameters: dict[str, int] = Field(default_factory=dict, description="parameters by order")
    log_evidence: float | None = None
    converged: bool | None = Field(None, description="whether the evidence has its maximum")
    iterations: int | None = Field(None, description="of the search for it")
    noise_limited: list[str] = Field(default_factory=list, description="labels whose noise is at its lower bound")
    energy: float | None = Field(None, description="of the ideal crystal, eV per primitive cell; null: unknown")
    force_scale: float = Field(description="conformal factor in use")
    fit_seconds: float | None = Field(None, description="wall time of the fit, s")
    epochs: int | None = Field(None, description="of a network's training")


class ForceErrors(Record):
    """Force errors of a model on labelled structures."""

    force_rmse: float = Field(description="root mean square error of components, eV/Å")
    force_rms: float = Field(description="root mean square of the labels, eV/Å")
    relative: float | None = Field(description="their ratio")
    structures: int
    energy_rmse_mev_per_atom: float | None = Field(None, description="of networks, meV/atom")


class Conformal(Record):
    """Factor that covers 1 - alpha of the true errors of the newest labels, each predicted before it was learnt."""

    scale: float
    alpha: float
    attainable: float = Field(description="share that so few labels can promise")
    count: int


class SignalEntry(Record):
    """A signal of convergence."""

    name: Literal["determined", "below noise", "little to gain"]
    holds: bool
    value: float
    threshold: float
    reason: str
    evidence: dict[str, Any]


class RoundEntry(Record):
    """A round of a dynamic run: a model, one piece of every trajectory with it, labels for those that asked."""

    round: int = Field(description="0, 1, ...")
    labels: int = Field(description="labels that the model of this round has learnt")
    calls: int = Field(description="structures that the reference was asked for so far, rejected ones too")
    md_steps: int = Field(description="MD steps of all replicas so far, this round's included")
    refit: bool = Field(description="whether the model is new in this round")
    learnt: list[Learnt] = Field(description="labels that this model has learnt and the one before had not")
    model: Fit
    train: ForceErrors
    test: ForceErrors | None = Field(None, description="on the test set, if there is one")
    conformal: Conformal | None = Field(description="null before the first label that was predicted")
    replicas: list[PieceResult] = Field(description="pieces of the trajectories")
    asked: list[Request] = Field(description="what the reference was asked for")
    passed: list[int] = Field(description="replicas that asked but whose frame others made superfluous")
    fresh_steps: int = Field(description="steps of all replicas since the last refit")
    signals: list[SignalEntry]
    converged: bool = Field(description="whether all three signals hold")
    seconds: dict[str, float] = Field(description="wall time by stage, s")
    ended: Ending | None = Field(None, description="only in the last entry of a finished run")
