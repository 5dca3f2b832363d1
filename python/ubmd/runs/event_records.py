"""Events of a run, one JSON object per line of events.jsonl. ``ubmd schema events`` prints this as JSON schema.

A listener of a run also gets two kinds that are too many to keep: 'epoch' and 'md_steps' (`Epoch`, `MDSteps`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter

from ubmd.lammps.engine import PieceResult, ReplicaResult
from ubmd.runs.records import Errors, ForceErrors, MayLack, Record


class Event(Record):
    """What all events have; one of a kind that this version does not know has nothing else."""

    event: str = Field(description="its kind")
    time: MayLack[str] = Field(description="ISO 8601, UTC")
    iteration: int | None = Field(None, description="of a loop; -1: the first labels")
    round: int | None = Field(None, description="of a dynamic run; -1: the first labels")

    @property
    def turn(self) -> int:
        """Iteration or round, -1 before the first."""
        turn = self.round if self.iteration is None else self.iteration
        return -1 if turn is None else turn


class RunStarted(Event):
    """A driver has started or resumed the run."""

    event: Literal["run_started"]
    process: MayLack[int] = Field(description="number of the driver's process")
    labels_wanted: MayLack[int]
    steps_wanted: int | None = Field(None, description="dynamic run: MD steps of all trajectories together")


class RunStopped(Event):
    """The driver was interrupted, or could not continue."""

    event: Literal["run_stopped"]
    why: MayLack[str]
    kind: MayLack[str] = Field(description="class of the error")


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
    """Settings that may change have changed since the last start."""

    event: Literal["settings_changed"]
    changes: dict[str, list[Any]] = Field(description="key -> [old, new]")


class Remark(Event):
    """Something that is not an error."""

    event: Literal["remark"]
    text: str


class Basis(Event):
    """The cluster basis of force constants is there."""

    event: Literal["basis"]
    parameters: int
    symmetry: list[str] = Field(description="sentences")


class _Stage(Event):
    stage: str
    labels: int | None = Field(None, description="in the data set")


class StageStarted(_Stage):
    """A stage has begun."""

    event: Literal["stage_started"]


class StageDone(_Stage):
    """A stage has ended."""

    event: Literal["stage_done"]
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
    """A segment of a trajectory has ended."""

    event: Literal["piece_done"]


class IterationDone(Event):
    """An iteration has its entry in the history."""

    event: Literal["iteration_done"]
    labels: int
    md_steps: int
    train: MayLack[Errors]
    valid: MayLack[Errors]
    test: Errors | None = None
    coverage: float | None = None


class LearntLabel(Record):
    """A label that is new to a round's model, in short; see `ubmd.runs.records.Learnt`."""

    label: int
    error_before: float | None
    true_before: float | None
    true_after: float


class RoundDone(Event):
    """A round has its entry in the history; the keys are those of the entry, in short."""

    event: Literal["round_done"]
    labels: int
    calls: int
    md_steps: int
    refit: bool
    train: MayLack[ForceErrors]
    test: ForceErrors | None = None
    fresh_steps: int
    converged: bool
    signals: dict[str, tuple[float, bool]] = Field(description="name -> (value, whether it holds)")
    noise: float = Field(description="eV/Å")
    determined: float | None = Field(description="share γ/P of the parameters; null for networks")
    learnt: list[LearntLabel]


class Epoch(Event):
    """An epoch of a training has ended; never kept."""

    event: Literal["epoch"]
    epoch: int
    epochs: int = Field(description="of the whole training")
    seconds: float | None = Field(None, description="that the epoch took")
    loss: float | None = Field(None, description="weighted squared errors per structure (no unit)")
    train_energy_rmse_meV_per_atom: float | None = Field(None, description="during the epoch, meV/atom")
    train_force_rmse_eV_per_A: float | None = Field(None, description="of force components, eV/Å")
    train_stress_rmse_MPa: float | None = Field(None, description="of stress components, MPa")
    valid_energy_rmse_meV_per_atom: float | None = Field(None, description="on validation labels, meV/atom")
    valid_force_rmse_eV_per_A: float | None = Field(None, description="of force components, eV/Å")
    valid_stress_rmse_MPa: float | None = Field(None, description="of stress components, MPa")


class MDSteps(Event):
    """How far replicas or trajectories are; never kept."""

    event: Literal["md_steps"]
    steps: list[int] = Field(description="that each has done")
    limit: int | None = Field(None, description="of each, in a loop")
    limits: list[int] | None = Field(None, description="of each, in a dynamic run")


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

_KINDS: dict[str, type[Event]] = {
    name: kind
    for kind in (*get_args(get_args(AnyEvent)[0]), Epoch, MDSteps)
    for name in get_args(kind.model_fields["event"].annotation)
}


def read_event(values: Mapping[str, Any]) -> Event:
    """An event as it is in the file, or as a listener gets it; see `Record.read` for those of other versions.

    Raises:
        DataError: it is damaged.
    """
    return _KINDS.get(values["event"], Event).read(values)
