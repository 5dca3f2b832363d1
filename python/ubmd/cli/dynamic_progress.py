"""Live progress of a dynamic run: bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

from rich.console import Console
from rich.progress import TaskID

from ubmd.cli.live import Bars, Lines, describe_any_run, joined, place
from ubmd.learning.dynamic.timeline import STAGE_NAMES, DynamicTimeline
from ubmd.runs.folder import Event
from ubmd.texts import to_go


class ProgressLines(Lines[DynamicTimeline]):
    """One plain line per thing worth knowing, and now and then one that says how far the trajectories are."""

    def _describe(self, event: Event) -> str:
        return describe_event(event)

    def _how_far(self, event: Event) -> str:
        if event["event"] == "epoch":
            return f"{_place(event)}training: epoch {event['epoch']}"
        if event["event"] != "md_steps":
            return ""
        line = self._timeline
        text = f"{_place(event)}MD: {line.steps:,} of at most {line.steps_wanted:,} steps"
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
        doing = ", ".join(STAGE_NAMES[stage] for stage in line.running if stage in STAGE_NAMES)
        self._bars.update(labels, completed=line.labels, total=line.wanted, left=doing)
        self._bars.update(steps, completed=line.steps, total=line.steps_wanted, left=to_go(line.left(), "at most "))


def make_progress(console: Console, timeline: DynamicTimeline) -> ProgressBars | ProgressLines:
    """The listener that suits the console; use it in a ``with`` block."""
    return ProgressBars(console, timeline) if console.is_terminal else ProgressLines(console, timeline)


def _place(event: Event) -> str:
    return place(event.get("round", -1))


def describe_event(event: Event) -> str:
    """One line about an event, or an empty text if it is not worth a line."""
    match event["event"]:
        case "run_started":
            return f"Dynamic training: at most {event['labels_wanted']} labels and {event['steps_wanted']:,} MD steps."
        case "basis":
            return " ".join([*event.get("symmetry", []), f"{event['parameters']} parameters."])
        case "stage_started" if event["stage"] == "test_set" or event.get("round") == -1:
            return f"{_place(event)}{STAGE_NAMES.get(event['stage'], event['stage'])} …"
        case "piece_done":
            return describe_piece(event)
        case "round_done":
            return describe_round(event)
        case "run_done":
            return f"Done with {event['labels']} labels after {event['rounds']} rounds. {event['reason']}"
    return describe_any_run(event, _place(event))


def describe_piece(event: Event) -> str:
    """One line about how a piece of a trajectory ended; nothing about a quiet one."""
    who = f"{_place(event)}replica {event['replica']} ({event['temperature']:g} K), step {event['end']}: "
    if event["ended"] == "asked":
        return f"{who}asks for a label, error {event['error']:.3g} > {event['threshold']:.3g} eV/Å ({event['rule']})"
    return f"{who}{event['reason']}" if event["ended"] != "segment" else ""


def describe_round(event: Event) -> str:
    """One line about a round's model and what its trajectories have shown."""
    parts = [f"{_place(event)}{event['labels']} labels, {event['md_steps']:,} MD steps"]
    for row in event["learnt"]:
        if row["error_before"] is not None:
            parts.append(
                f"label {row['label']}: predicted {row['error_before']:.3g}, true {row['true_before']:.3g} eV/Å"
            )
    if event["refit"]:
        for name in ("test", "train"):
            if name in event:
                share = event[name]["relative"]
                tail = "" if share is None else f" ({100 * share:.1f} %)"
                parts.append(f"{name} {event[name]['force_rmse']:.3g} eV/Å{tail}")
                break
        if event["noise"]:
            parts.append(f"noise {event['noise']:.3g} eV/Å")
    if event["signals"]:
        shown = [f"{name} {value:.3g} {'✓' if holds else '✗'}" for name, (value, holds) in event["signals"].items()]
        parts.append(", ".join(shown))
    return "; ".join(parts)
