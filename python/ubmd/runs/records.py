"""What runs write down for others to read: entries of history.json, and events of events.jsonl.

One entry per finished iteration (active-learning loop) or round (dynamic run). Keys that do not apply are left out;
files of earlier versions may lack some. ``ubmd schema history`` prints this as JSON schema.

Writing is strict: `Record.model_validate` refuses unknown and missing keys. Reading is not (`Record.read`): a file may
be of an earlier or a later version, and code that reads a field that may be None has to do without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic.json_schema import SkipJsonSchema

from ubmd.errors import DataError
from ubmd.lammps.engine import PieceResult, ReplicaResult
from ubmd.texts import counted

T = TypeVar("T")


def _given(value: T) -> T:
    if value is None:
        raise ValueError("null is not allowed here")
    return value


MayLack = Annotated[T | SkipJsonSchema[None], AfterValidator(_given)]
"""Always written, but files may lack it: None when read."""


@dataclass(frozen=True)
class IfLacking:
    """Mark of a field that is always written, with the value of files that lack it."""

    value: Any


class Record(BaseModel):
    """A record that is written; unknown keys are programming errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def as_json(self) -> dict[str, Any]:
        """The keys that were given, in their order: declared, or as in the file; NaN stays NaN."""
        return self.model_dump(exclude_unset=True, warnings=False)  # one that was read may lack more than a new one

    @classmethod
    def read(cls, values: Any) -> Self:
        """What a file has, of whatever version.

        Keys that are not declared are passed over. What is missing is None where the type allows it, the default if
        there is one, an empty list or dictionary; anything else is an error when it is accessed (DataError). Numbers
        and texts are taken as they are. `as_json` has the known keys of the file again.

        Args:
            values: of a JSON file.

        Raises:
            DataError: the values, or some within them, are not a record or a list of records.
        """
        if not isinstance(values, dict):
            raise DataError(f"{_shown(cls)} of a file is damaged: it is not a table of values.")
        how = _reading(cls)
        found = {
            name: value
            for name, value in values.items()
            if name in how.names and (value is not None or name in how.may_be_none)
        }
        given = set(found)
        for name, build in how.builders.items():
            if found.get(name) is not None:
                found[name] = build(found[name])
        for name, make in how.lacking.items():
            if name not in given:
                found[name] = make()
        # As `model_construct` makes it, which would reorder the keys, and takes twice as long.
        made = cls.__new__(cls)
        object.__setattr__(made, "__dict__", found)
        object.__setattr__(made, "__pydantic_fields_set__", given)
        object.__setattr__(made, "__pydantic_extra__", None)
        object.__setattr__(made, "__pydantic_private__", None)
        return made

    if not TYPE_CHECKING:  # otherwise mypy would accept every name

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                kind = _shown(type(self))
                raise DataError(f"{kind} of a file has no '{name}': damaged, or of another version of ubmd.")
            return super().__getattr__(name)


@dataclass(frozen=True)
class _Reading:
    """How a kind of record is read: names of fields, and what they need."""

    names: frozenset[str]
    may_be_none: frozenset[str]
    builders: dict[str, Callable[[Any], Any]]
    """of fields with records in them"""
    lacking: dict[str, Callable[[], Any]]
    """makes what stands for a missing value"""


@cache
def _reading(kind: type[Record]) -> _Reading:
    fields = kind.model_fields
    options = {name: _options(field) for name, field in fields.items()}
    may_be_none = frozenset(name for name in fields if NoneType in options[name])
    builders = {name: build for name in fields for build in map(_builder, options[name]) if build}
    lacking = {name: make for name, field in fields.items() if (make := _lacking(field, name in may_be_none))}
    return _Reading(frozenset(fields), may_be_none, builders, lacking)


def _options(field: FieldInfo) -> list[Any]:
    """The types that a value may have, without marks."""
    is_union = get_origin(field.annotation) in (Union, UnionType)
    return [_bare(option) for option in (get_args(field.annotation) if is_union else (field.annotation,))]


def _bare(option: Any) -> Any:
    """A type without marks."""
    return get_args(option)[0] if get_origin(option) is Annotated else option


def _builder(option: Any) -> Callable[[Any], Any] | None:
    """What makes a record, or a list of records."""
    if isinstance(option, type) and issubclass(option, Record):
        return option.read
    items = [item for item in get_args(option) if get_origin(option) is list and isinstance(item, type)]
    return next((partial(_read_all, item) for item in items if issubclass(item, Record)), None)


def _read_all(kind: type[Record], values: Any) -> list[Record]:
    if not isinstance(values, list):
        raise DataError(f"{_shown(kind)} of a file is damaged: it is not in a list.")
    return [kind.read(value) for value in values]


def _lacking(field: FieldInfo, may_be_none: bool) -> Callable[[], Any] | None:
    marks = [mark for mark in field.metadata if isinstance(mark, IfLacking)]
    if marks:
        return partial(getattr, marks[0], "value")
    if may_be_none:
        return NoneType
    if not field.is_required():
        return partial(field.get_default, call_default_factory=True)
    return {list: list, dict: dict}.get(get_origin(field.annotation))  # type: ignore[arg-type]


def _shown(kind: type[Record]) -> str:
    """A class as a sentence begins with it: 'A record RoundEntry'."""
    return f"A record {kind.__name__!r}"


class Ending(Record):
    """Why a run has ended."""

    rule: str = Field(description="stop rule that holds")
    reason: str = Field(description="one sentence")
    evidence: dict[str, Any] = Field(default_factory=dict, description="the numbers that the rule saw")


# ------------------------------------------------------------------------------------------ loop


class Errors(Record):
    """Errors of a model on labelled structures."""

    energy_rmse_mev_per_atom: MayLack[float] = Field(description="root mean square error, meV/atom")
    force_rmse: MayLack[float] = Field(description="of force components, eV/Å")
    stress_rmse_mpa: float | None = Field(None, description="of stress components, MPa; where there are stress labels")
    structures: MayLack[int] = Field(description="number of structures")

    @property
    def behind(self) -> str:
        """' (3 structures)': what follows a printed error; nothing where the number is not known."""
        return "" if self.structures is None else f" ({counted(self.structures, 'structure')})"

    @property
    def rmse(self) -> Rmse:
        """Of energy (meV/atom), forces (eV/Å) and stress (MPa); None where there is none."""
        return self.energy_rmse_mev_per_atom, self.force_rmse, self.stress_rmse_mpa


class Calibration(Record):
    """Conformal factors of a model, and the highest shares of errors below u attainable with so few structures."""

    energy_factor: float
    force_factor: MayLack[float]
    energy_attainable: MayLack[float]
    force_attainable: MayLack[float]


class NewLabels(Record):
    """Labels of an iteration, as the model that selected them had predicted them."""

    structures: int
    covered: int = Field(description="structures whose largest force error does not exceed their largest u_i")
    promised: float = Field(description="the share of structures, or of atoms, for which the calibration promises it")
    share_of_atoms: float = Field(description="atoms whose force error does not exceed u_i")
    max_error: float = Field(description="median over structures of the largest RMSE(F_i), eV/Å")
    max_u: float = Field(description="median over structures of the largest u_i, eV/Å")


class _Origin(Record):
    iteration: int | None = Field(None, description="iteration that a replica began in, if it is an earlier one")


class Replica(ReplicaResult, _Origin):
    """How a replica ended."""


Rmse = tuple[float | None, float | None, float | None]
SetName = Literal["train", "valid", "calib", "test"]
"""what errors are measured on"""


class IterationEntry(Record):
    """An iteration of the active-learning loop."""

    iteration: int = Field(description="0, 1, ...")
    labels: int = Field(description="labels that this iteration's model was trained, validated and calibrated on")
    md_steps: int = Field(description="MD steps of all replicas so far")
    train: MayLack[Errors] = Field(description="on labels that the model was trained on")
    valid: MayLack[Errors] = Field(description="on labels that stopped the training early")
    calib: Errors | None = Field(None, description="on labels that only calibrate, if there are any")
    test: Errors | None = Field(None, description="on the test set, if there is one")
    calibration: Calibration | None = Field(None, description="factors of the uncertainties")
    chosen: NewLabels | None = Field(None, description="new labels that were selected, predicted before learning them")
    drawn: NewLabels | None = Field(None, description="new labels that were drawn at random, predicted likewise")
    coverage: float | None = Field(description="share of the square of the first two torsions visited so far")
    max_u: float | None = Field(description="largest atomic uncertainty of this iteration's frames, eV/Å")
    replicas: list[Replica] = Field(description="those that ended in this iteration")
    seconds: dict[str, float] = Field(description="wall time by stage, s")
    ended: Ending | None = Field(None, description="only in the last entry of a finished run")

    def errors_on(self, name: SetName) -> Errors | None:
        """Errors on a set, if they were measured."""
        return {"train": self.train, "valid": self.valid, "calib": self.calib, "test": self.test}[name]

    def rmse_on(self, name: SetName) -> Rmse:
        """`Errors.rmse` on a set, None for each if they were not measured."""
        errors = self.errors_on(name)
        return errors.rmse if errors else (None, None, None)


# ------------------------------------------------------------------------------------------ dynamic runs


class Request(Record):
    """A structure for which a trajectory requested a label."""

    label: int | None = Field(None, description="number in the data set; null if it was rejected")
    replica: int
    temperature: float | None = Field(description="K; null for start labels")
    step: int = Field(description="of the replica's trajectory")
    rule: str = Field(description="'start', 'absolute', 'average', 'history', 'extrapolation' or 'guard'")
    threshold: float | None = Field(description="that was passed, eV/Å; null for start, extrapolation and guard")
    rejected: str = Field("", description="why it has no label")
    error_before: float | None = Field(description="predicted by the model that had not seen it, eV/Å")
    true_before: float | None = Field(description="largest |ΔF| of a component with that model, eV/Å")
    rms_before: float | None = Field(description="root mean square ΔF with that model, eV/Å")
    drop: float | None = Field(None, description="predicted relative drop of the mean error by learning it")


class Learnt(Request):
    """A label that is new to a round's model."""

    error_after: MayLack[float] = Field(description="predicted by this round's model, eV/Å")
    true_after: MayLack[float] = Field(description="largest |ΔF| of a component with it, eV/Å")
    rms_after: float = Field(description="root mean square ΔF with it, eV/Å")


class Constraint(Record):
    """What crystal.stable changed."""

    rows: int = Field(description="inequalities that were needed")
    lowest: float = Field(description="lowest curvature of the plain fit, eV/Å^2")
    rmse_without: float = Field(description="error of the labels' forces of the plain fit, eV/Å")
    rmse_with: float = Field(description="the same of the model, eV/Å")


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
    force_scale: MayLack[float] = Field(description="conformal factor in use")
    constraint: Constraint | None = Field(None, description="with crystal.stable")
    fit_seconds: float | None = Field(None, description="wall time of the fit, s")
    epochs: int | None = Field(None, description="of a network's training")


class ForceErrors(Record):
    """Force errors of a model on labelled structures."""

    force_rmse: float = Field(description="root mean square error of components, eV/Å")
    force_rms: MayLack[float] = Field(description="root mean square of the labels, eV/Å")
    relative: float | None = Field(description="their ratio")
    structures: int
    energy_rmse_mev_per_atom: float | None = Field(None, description="of networks, meV/atom")


class Conformal(Record):
    """Factor that covers 1 - alpha of the true errors of the newest labels, each predicted before it was learnt."""

    scale: MayLack[float]
    alpha: float
    attainable: float = Field(description="highest share attainable with so few labels")
    count: int


class SignalEntry(Record):
    """A signal of convergence."""

    name: Literal["determined", "below noise", "little to gain"]
    holds: bool
    value: float
    threshold: float
    reason: str
    evidence: dict[str, Any]


class Piece(PieceResult, Record):
    """How a segment of a trajectory ended."""

    max_displacement: Annotated[float, IfLacking(0.0)]
    ms_per_step: Annotated[float, IfLacking(0.0)]


class RoundEntry(Record):
    """A round of a dynamic run: a model, one segment of every trajectory with it, the labels that these requested."""

    round: int = Field(description="0, 1, ...")
    labels: int = Field(description="labels that the model of this round has learnt")
    calls: int = Field(description="reference calculations requested so far, rejected ones too")
    md_steps: int = Field(description="MD steps of all replicas so far, this round's included")
    refit: bool = Field(description="whether the model is new in this round")
    learnt: list[Learnt] = Field(description="labels that this model has learnt and the one before had not")
    model: Fit
    train: MayLack[ForceErrors]
    test: ForceErrors | None = Field(None, description="on the test set, if there is one")
    conformal: Conformal | None = Field(description="null before the first label that was predicted")
    replicas: list[Piece] = Field(description="segments of the trajectories")
    asked: list[Request] = Field(description="requested reference calculations")
    passed: list[int] = Field(description="replicas whose request became superfluous by the labels of others")
    fresh_steps: int = Field(description="steps of all replicas since the last refit")
    signals: list[SignalEntry]
    converged: bool = Field(description="whether all three signals hold")
    seconds: dict[str, float] = Field(description="wall time by stage, s")
    ended: Ending | None = Field(None, description="only in the last entry of a finished run")
