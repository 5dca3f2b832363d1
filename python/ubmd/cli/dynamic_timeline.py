"""Live progress of a dynamic run, and what `ubmd status` says about one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import TaskID
from rich.table import Table as RichTable
from rich.text import Text

from ubmd.cli.live import Bars, Lines
from ubmd.cli.loop_status import describe_idle, is_running
from ubmd.learning.work.groups import describe_loss, describe_losses
from ubmd.runs.folder import Event, RunFolder
from ubmd.runs.manifest import read_settings_of
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.texts import duration

STAGE_NAMES = {"learn": "training", "measure": "errors", "move": "MD", "label": "labels", "test_set": "test set"}
_SHOWN = 12  # newest refits in the table


class Course:
    """Follows the events of a run.

    Attributes:
        labels, calls: in the data set, and asked for. wanted: most calls. steps, steps_wanted: of all replicas.
        running: stages. finished: why the run ended, or empty. stopped: why the driver ended, if it could say.
        error: class of the error that stopped it, or empty.
    """

    def __init__(self, settings: DynamicRunSettings, events: Iterable[Event] = ()) -> None:
        self.wanted = settings.dynamic.labels
        self.steps_wanted = settings.dynamic.steps * settings.dynamic.trajectories
        self.labels = self.calls = self.steps = self.round = 0
        self.running: dict[str, datetime] = {}
        self.process: int | None = None
        self.finished = self.stopped = self.error = ""
        self.last_event: datetime | None = None
        self._settled = 0  # steps of finished rounds
        self._begun: tuple[float, int] | None = None  # time and steps when this driver began to move
        for event in events:
            with suppress(KeyError, TypeError, ValueError):  # an old or damaged file
                self.add(event)
        self._begun = None

    def add(self, event: Event) -> None:
        """Take note of an event."""
        if "time" in event:
            self.last_event = datetime.fromisoformat(event["time"])
        self.round = max(self.round, event.get("round", 0))
        match event["event"]:
            case "run_started":
                self.running.clear()
                self.process, self.finished, self.stopped = event["process"], "", ""
                self.wanted, self.steps_wanted = event["labels_wanted"], event["steps_wanted"]
            case "stage_started":
                self.running[event["stage"]] = self.last_event or datetime.now(UTC)
            case "stage_done":
                self.running.pop(event["stage"], None)
            case "label_done" | "label_rejected":
                self.calls += 1
            case "label_appended":
                self.labels = max(self.labels, event["label"] + 1)
            case "md_steps":
                self.steps = self._settled + sum(event["steps"])
                self._begun = self._begun or (time.monotonic(), self.steps)
            case "round_done":
                self.steps = self._settled = event["md_steps"]
                self.calls = max(self.calls, event["calls"])
            case "run_stopped":
                self.stopped, self.error = event.get("why", ""), event.get("kind", "")
            case "run_done":
                self.finished = event["reason"]
                self.running.clear()

    def left(self) -> float | None:
        """Time to the end of all trajectories at the pace of this driver, labels and refits included, s."""
        if self._begun is None or self.steps <= self._begun[1]:
            return None
        pace = (time.monotonic() - self._begun[0]) / (self.steps - self._begun[1])
        return pace * (self.steps_wanted - self.steps)


class ProgressLines(Lines[Course]):
    """One plain line per thing worth knowing, and now and then one that says how far the trajectories are."""

    def _describe(self, event: Event) -> str:
        return describe_event(event)

    def _how_far(self, event: Event) -> str:
        if event["event"] == "epoch":
            return f"{_place(event)}training: epoch {event['epoch']}"
        if event["event"] != "md_steps":
            return ""
        course = self._course
        return f"{_place(event)}MD: {course.steps:,} of at most {course.steps_wanted:,} steps{_to_go(course)}"


class ProgressBars(Bars[Course]):
    """The lines of `ProgressLines` above two live bars: labels, and MD steps of all trajectories."""

    def __init__(self, console: Console, course: Course) -> None:
        super().__init__(console, course, ProgressLines, width=10)
        self._tasks: list[TaskID] = []

    def _show(self, event: Event) -> None:
        course = self._course
        if not self._tasks:
            self._tasks = [self._bars.add_task(name, left="") for name in ("labels", "MD steps")]
        labels, steps = self._tasks
        doing = ", ".join(STAGE_NAMES[stage] for stage in course.running if stage in STAGE_NAMES)
        self._bars.update(labels, completed=course.labels, total=course.wanted, left=doing)
        self._bars.update(steps, completed=course.steps, total=course.steps_wanted, left=_to_go(course).lstrip("; "))


def make_progress(console: Console, course: Course) -> ProgressBars | ProgressLines:
    """The listener that suits the console; use it in a ``with`` block."""
    return ProgressBars(console, course) if console.is_terminal else ProgressLines(console, course)


def _to_go(course: Course) -> str:
    left = course.left()
    return "" if left is None or left < 0.5 else f"; at most about {duration(left)} to go"


def _place(event: Event) -> str:
    number = event.get("round", -1)
    return f"[{number:3d}] " if number >= 0 else "[start] "


def describe_event(event: Event) -> str:
    """One line about an event, or an empty text if it is not worth a line."""
    match event["event"]:
        case "run_started":
            return f"Dynamic training: at most {event['labels_wanted']} labels and {event['steps_wanted']:,} MD steps."
        case "remark":
            return f"Remark: {event['text']}"
        case "basis":
            return " ".join([*event.get("symmetry", []), f"{event['parameters']} parameters."])
        case "stage_started" if event["stage"] == "test_set" or event.get("round") == -1:
            return f"{_place(event)}{STAGE_NAMES.get(event['stage'], event['stage'])} …"
        case "piece_done":
            return describe_piece(event)
        case "task_lost":
            return f"{_place(event)}{describe_loss(event)}"
        case "label_rejected":
            return f"{_place(event)}label {event['index']} rejected: {event['why']}"
        case "round_done":
            return describe_round(event)
        case "run_done":
            return f"Done with {event['labels']} labels after {event['rounds']} rounds. {event['reason']}"
    return ""


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


# ------------------------------------------------------------------------------------------ status


def status(run_dir: Path) -> RenderableType:
    """State and one table of the refits of a dynamic run.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings = read_settings_of(folder, DynamicRunSettings)
    events = folder.read_events()
    course, running = Course(settings, events), is_running(folder)
    lines = [
        f"{folder.path}: {'running' if running else describe_idle(course)}",
        f"{course.labels} labels, {course.calls} of at most {course.wanted} structures asked for; "
        f"{course.steps:,} of at most {course.steps_wanted:,} MD steps.",
    ]
    if running and course.running:
        now = datetime.now(UTC)
        doing = [
            f"{STAGE_NAMES.get(s, s)} since {duration((now - t).total_seconds())}" for s, t in course.running.items()
        ]
        lines.append(f"Round {course.round}: {', '.join(doing)}.")
    lines += describe_losses(events)
    history = folder.read_history()
    parts: list[RenderableType] = [Text(line) for line in lines]
    if history:
        parts.append(_table([entry for entry in history if entry["refit"]][-_SHOWN:]))
        parts += [Text(signal["reason"]) for signal in history[-1]["signals"]]
    return Group(*parts)


def _table(refits: list[dict[str, Any]]) -> RichTable:
    """One row per refit; columns that no refit has are left out."""
    columns: dict[str, list[str]] = {
        "round": [str(entry["round"]) for entry in refits],
        "labels": [str(entry["labels"]) for entry in refits],
        "MD\nsteps": [f"{entry['md_steps']:,}" for entry in refits],
        "predicted\neV/Å": [_newest(entry, "error_before") for entry in refits],
        "true\neV/Å": [_newest(entry, "true_before") for entry in refits],
        "noise\neV/Å": [_number(entry["model"]["noise"] or None, ".3g") for entry in refits],
        "determined\n%": [_determined(entry["model"]) for entry in refits],
        "train F\n%": [_percent(entry.get("train")) for entry in refits],
        "test F\n%": [_percent(entry.get("test")) for entry in refits],
    }
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, cells in list(columns.items()):
        if all(cell in ("", "-") for cell in cells):
            del columns[name]
        else:
            table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _newest(entry: dict[str, Any], name: str) -> str:
    """Of the worst label that this refit has learnt."""
    values = [row[name] for row in entry["learnt"] if row[name] is not None]
    return _number(max(values, default=None), ".3g")


def _determined(model: dict[str, Any]) -> str:
    if not model.get("gamma"):
        return "-"
    return f"{100 * sum(model['gamma'].values()) / sum(model['parameters'].values()):.0f}"


def _percent(errors: dict[str, Any] | None) -> str:
    share = (errors or {}).get("relative")
    return "-" if share is None else f"{100 * share:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
