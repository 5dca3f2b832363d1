"""One round of dynamic training, and the results of a run so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ase import Atoms
from pydantic import Field

from ubmd.runs.records import Record, RoundEntry, SignalEntry
from ubmd.runs.stages import Stages


@dataclass(eq=False)
class Round:
    """One round: where it works, and what it starts from."""

    number: int
    once: Stages
    labels: int
    """that the model has learnt"""
    before: Round | None = field(repr=False)
    """the round before"""
    refit: bool
    """whether it has a model of its own: if not, nothing was learnt since the round before"""
    keys: dict[str, str]
    owner: Round = field(init=False, repr=False)
    """the round whose model this round uses"""

    def __post_init__(self) -> None:
        self.owner = self if self.refit or self.before is None else self.before.owner

    @property
    def folder(self) -> Path:
        """Where it works."""
        return self.once.folder

    @property
    def previous(self) -> Round | None:
        """The round whose model is the one before this round's."""
        first = self.owner.before
        return None if first is None else first.owner


@dataclass(frozen=True)
class Past:
    """The results of a run so far; the engine adds to these lists."""

    dataset: list[Atoms]
    history: list[RoundEntry]
    rounds: list[Round]


class RoundSignals(Record):
    """What a round's segments say about convergence; empty if none was run."""

    signals: list[SignalEntry] = Field(default_factory=list)
    converged: bool = False
    fresh_steps: int = 0
    """of all replicas since the last refit"""
    drops: dict[str, float] = Field(default_factory=dict)
    """replica that requested a label -> predicted relative drop of the error"""
    chosen: list[int] = Field(default_factory=list)
    """replicas with a request, those to label"""
