"""Events of a run, one JSON object per line of events.jsonl. ``ubmd schema events`` prints this as JSON schema.

A listener of a run also gets two kinds that are too many to keep: 'epoch' and 'md_steps'.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from ubmd.lammps.engine import PieceResult, ReplicaResult
from ubmd.runs.records import Errors, Record


class Event(Record):
    """What all events have."""

    time: str = Field(description="ISO 8601, UTC")
    iteration: int | None = Field(None, description="of a loop; -1: the first labels")
    round: int | None = Field(None, description="of a dynamic run; -1: the first labels")


class RunStarted(Event):
    """A driver has begun, or goes on."""

    event: Literal["run_started"]
    process: int = Field(description="number of the driver's process")
    labels_wanted: int
    steps_wanted: int | None = Field(None, description="dynamic run: MD steps of all trajectories together")


class RunStopped(Event):
    """The driver was interrupted, or could not go on."""

    event: Literal["run_stopped"]
    why: str
    kind: str = Field(description="class of the error")


class RunDone(Event):
    """The run has ended by one of its rules."""

    event: Literal["run_done"]
    labels: int
    iterations: int | None = None
    rounds: int | None = None
    rule: str
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)


class SettingsChanged(Event):
    """Settings that may change did so since the last start."""

    event: Literal["settings_changed"]
    changes: dict[str, list[Any]] = Field(description="key -> [old, new]")


class Remark(Event):
    """Something that is no mistake."""

    event: Literal["remark"]
    text: str


class Basis(Event):
    """The cluster basis of force constants is there."""

    event: Literal["basis"]
    parameters: int
    symmetry: list[str] = Field(description="sentences")


class StageStarted(Event):
    """A stage has begun."""

    event: Literal["stage_started"]
    stage: str
    labels: int | None = Field(None, description="in the data set")


class StageDone(StageStarted):
    """A stage has ended."""

    event: Literal["stage_done"]  # type: ignore[assignment]
    seconds: float


class TrajectoryDone(Event):
    """A trajectory of reference MD for the test set has ended."""

    event: Literal["trajectory_done"]
    trajectory: int
    why: str = Field(description="empty, or why it failed")


class LabelDone(Event):
    """A structure of the batch has its label, or was rejected."""

    event: Literal["label_done", "label_rejected"]
    index: int = Field(description="in the batch")
    why: str = Field(description="of a rejection")


class LabelAppended(Event):
    """A label is in the data set."""

    event: Literal["label_appended"]
    label: int = Field(description="its number")


class TaskLost(Event):
    """The process of a task crashed, or was lost by a fault of the machine."""

    event: Literal["task_lost"]
    what: str = Field(description="'label', 'replica', 'piece', 'training', 'trajectory' or 'reference'")
    index: int | str
    why: str
    again: bool = Field(description="whether it is tried again")
    crashed: bool


class ReplicaDone(ReplicaResult, Event):
    """A replica has ended."""

    event: Literal["replica_done"]


class PieceDone(PieceResult, Event):
    """A piece of a trajectory has ended."""

    event: Literal["piece_done"]


class IterationDone(Event):
    """An iteration has its entry in the history."""

    event: Literal["iteration_done"]
    labels: int
    md_steps: int
    train: Errors
    valid: Errors
    test: Errors | None = None
    coverage: float | None = None


class RoundDone(Event):
    """A round has its entry in the history; the keys are those of the entry, in short."""

    event: Literal["round_done"]
    labels: int
    calls: int
    md_steps: int
    refit: bool
    train: dict[str, Any]
    test: dict[str, Any] | None = None
    fresh_steps: int
    converged: bool
    signals: dict[str, tuple[float, bool]] = Field(description="name -> (value, whether it holds)")
    noise: float = Field(description="eV/Å")
    determined: float | None = Field(description="share γ/P of the parameters; null for networks")
    learnt: list[dict[str, Any]]


AnyEvent = Annotated[
    RunStarted
    | RunStopped
    | RunDone
    | SettingsChanged
    | Remark
    | Basis
    | StageStarted
    | StageDone
    | TrajectoryDone
    | LabelDone
    | LabelAppended
    | TaskLost
    | ReplicaDone
    | PieceDone
    | IterationDone
    | RoundDone,
    Field(discriminator="event"),
]
EVENTS: TypeAdapter[Any] = TypeAdapter(AnyEvent)
"""validates an event, and has the schema of all"""
