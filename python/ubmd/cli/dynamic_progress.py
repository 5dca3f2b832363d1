"""Live progress of a dynamic run: bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import TaskID

from ubmd.cli.live import Bars, Lines, describe_any_run, joined, place
from ubmd.learning.dynamic.timeline import DynamicTimeline
from ubmd.runs.event_records import (
    Basis,
    Epoch,
    Event,
    MDSteps,
    PieceDone,
    RoundDone,
    RunDone,
    RunStarted,
    StageStarted,
)
from ubmd.runs.stage_names import stage_name
from ubmd.texts import counted, to_go


class ProgressLines(Lines[DynamicTimeline]):
    """One plain line per notable event, and now and then one on the progress of the trajectories."""

    def _describe(self, event: Event) -> str:
        return describe_event(event)

    def _how_far(self, event: Event) -> str:
        if isinstance(event, Epoch):
            return f"{place(event)}training: epoch {event.epoch}"
        if not isinstance(event, MDSteps):
            return ""
        line = self._timeline
        text = f"{place(event)}MD: {line.steps:,} of at most {line.steps_wanted:,} steps"
        return text + joined(to_go(line.left(), "at most "))


class ProgressBars(Bars[DynamicTimeline]):
    """The lines of `ProgressLines` above two live bars: labels, and MD steps of all trajectories."""

    def __init__(self, console: Console, timeline: DynamicTimeline) -> None:
        super().__init__(console, timeline, ProgressLines, width=10)
        self._tasks: list[TaskID] = []

    def _show(self, event: Event) -> None:
        line = self._timeline
        if not self._tasks:
            self._tasks = [self._bars.add_task(name, left="") for name in ("labels", "MD steps")]
        labels, steps = self._tasks
        doing = ", ".join(stage_name(stage) for stage in line.running)
        self._bars.update(labels, completed=line.labels, total=line.wanted, left=doing)
        self._bars.update(steps, completed=line.steps, total=line.steps_wanted, left=to_go(line.left(), "at most "))


def make_progress(console: Console, timeline: DynamicTimeline) -> ProgressBars | ProgressLines:
    """The listener that suits the console; use it in a ``with`` block."""
    return ProgressBars(console, timeline) if console.is_terminal else ProgressLines(console, timeline)


def describe_event(event: Event) -> str:
    """One line about an event, or an empty text if it is not worth a line."""
    match event:
        case RunStarted():
            return f"Dynamic training: at most {event.labels_wanted} labels and {event.steps_wanted:,} MD steps."
        case Basis():
            return " ".join([*event.symmetry, f"{event.parameters} parameters."])
        case StageStarted() if event.stage == "test_set" or event.round == -1:
            return f"{place(event)}{stage_name(event.stage)} …"
        case PieceDone():
            return describe_piece(event)
        case RoundDone():
            return describe_round(event)
        case RunDone():
            return f"Done with {event.labels} labels after {event.rounds} rounds. {event.reason}"
    return describe_any_run(event)


def describe_piece(event: PieceDone) -> str:
    """One line about how a segment of a trajectory ended; empty if it reached its end without a request."""
    who = f"{place(event)}replica {event.replica} ({event.temperature:g} K), step {event.end}: "
    if event.ended == "asked":
        errors = f"error {event.error:.3g} eV/Å, displacements beyond those of all labels"
        if event.threshold is not None:
            errors = f"error {event.error:.3g} > {event.threshold:.3g} eV/Å"
        return f"{who}requests a reference calculation, {errors} ({event.rule})"
    return f"{who}{event.reason}" if event.ended != "segment" else ""


def describe_round(event: RoundDone) -> str:
    """One line about a round's model and the errors along its trajectories."""
    parts = [f"{place(event)}{event.labels} labels, {event.md_steps:,} MD steps"]
    for row in event.learnt:
        if row.error_before is not None:
            parts.append(f"label {row.label}: predicted {row.error_before:.3g}, true {row.true_before:.3g} eV/Å")
    if event.refit:
        for name, errors in (("test", event.test), ("train", event.train)):
            if errors is not None:
                tail = "" if errors.relative is None else f" ({100 * errors.relative:.1f} %)"
                behind = counted(errors.structures, "structure")
                parts.append(f"{name} {errors.force_rmse:.3g} eV/Å{tail} ({behind})")
                break
        if event.noise:
            parts.append(f"noise {event.noise:.3g} eV/Å")
    if event.signals:
        shown = [f"{name} {value:.3g} {'✓' if holds else '✗'}" for name, (value, holds) in event.signals.items()]
        parts.append(", ".join(shown))
    return "; ".join(parts)
