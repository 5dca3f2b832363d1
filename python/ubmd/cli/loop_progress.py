"""Live progress of a run: bars on a terminal, plain lines everywhere else. A listener for `ubmd.learning.run`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import TaskID

from ubmd.cli.live import Bars, Lines
from ubmd.learning.loop.timeline import STAGE_NAMES, Timeline, describe_work
from ubmd.learning.work.groups import describe_loss
from ubmd.runs.folder import Event
from ubmd.texts import duration


class ProgressLines(Lines[Timeline]):
    """One plain line per thing worth knowing, and now and then one that says how far a long stage is."""

    def _describe(self, event: Event) -> str:
        return describe_event(event)

    def _how_far(self, event: Event) -> str:
        stage = {"epoch": "train", "md_steps": "md", "label_done": "label"}.get(event["event"], "")
        if not stage:
            return ""
        line = f"{_place(event)}{STAGE_NAMES[stage]}: {describe_work(stage, self._course.work.get(stage))}"
        return line + _left(self._course, stage)


class ProgressBars(Bars[Timeline]):
    """The lines of `ProgressLines` above live bars: labels of the run, and the work of each running stage."""

    def __init__(self, console: Console, timeline: Timeline) -> None:
        super().__init__(console, timeline, ProgressLines, width=32)
        self._labels: TaskID | None = None
        self._stages: dict[str, TaskID] = {}

    def _show(self, event: Event) -> None:
        line = self._course
        if event["event"] == "run_started" and self._labels is None:
            self._labels = self._bars.add_task("labels", total=line.wanted, left="")
        for stage in set(self._stages) - set(line.running):
            self._bars.remove_task(self._stages.pop(stage))
        for stage in line.running:
            self._show_stage(stage)
        if self._labels is not None:
            self._bars.update(self._labels, completed=line.labels, left=_to_go(line.run_left(), "run: "))

    def _show_stage(self, stage: str) -> None:
        line = self._course
        if stage not in self._stages:
            where = f"iteration {line.iteration}: " if line.iteration >= 0 else ""
            self._stages[stage] = self._bars.add_task(where + _stage_name(stage), total=None, left="")
        done, total = line.work.get(stage, (0, 0))
        left = _to_go(line.stage_left(stage), "")
        self._bars.update(self._stages[stage], completed=done, total=total or None, left=left)


def make_progress(console: Console, timeline: Timeline) -> ProgressBars | ProgressLines:
    """The listener that suits the console; use it in a ``with`` block."""
    return ProgressBars(console, timeline) if console.is_terminal else ProgressLines(console, timeline)


def _to_go(seconds: float | None, what: str) -> str:
    return "" if seconds is None or seconds < 0.5 else f"{what}about {duration(seconds)} to go"


def _left(timeline: Timeline, stage: str) -> str:
    """Estimates for a stage and the run, as the end of a line."""
    parts = [_to_go(timeline.stage_left(stage), ""), _to_go(timeline.run_left(), "run: ")]
    return "".join(f"; {part}" for part in parts if part)


def _stage_name(stage: str) -> str:
    return STAGE_NAMES.get(stage, stage)


def describe_event(event: Event) -> str:
    """One line about an event, or an empty text if it is not worth a line."""
    match event["event"]:
        case "run_started":
            return f"Run to {event['labels_wanted']} labels."
        case "remark":
            return f"Remark: {event['text']}"
        case "stage_started" if event["stage"] in ("test_set", "train", "md"):
            return f"{_place(event)}{_stage_name(event['stage'])} …"
        case "stage_started" if event["stage"] == "label" and event.get("iteration", -1) < 0:
            return f"{_place(event)}{_stage_name('label')} …"
        case "stage_done" if event["stage"] == "train":
            return f"{_place(event)}trained on {event['labels']} labels in {duration(event['seconds'])}."
        case "replica_done":
            return f"{_place(event)}{describe_replica(event)}"
        case "task_lost":
            return f"{_place(event)}{describe_loss(event)}"
        case "label_rejected":
            return f"{_place(event)}label {event['index']} rejected: {event['why']}"
        case "iteration_done":
            return f"{_place(event)}{describe_iteration(event)}"
        case "run_done":
            return f"Done after {event['iterations']} iterations. {event['reason']}"
    return ""


def _place(event: Event) -> str:
    iteration = event.get("iteration", -1)
    return f"[{iteration:3d}] " if iteration >= 0 else "[start] "


def describe_replica(result: dict[str, Any]) -> str:
    """One line about how a replica ended."""
    text = f"replica {result['replica']}: {result['steps']} steps, {result['stopped']}"
    if result["reason"]:
        text += f" ({result['reason']})"
    return f"{text}; max u {result['max_u']:.2f} eV/Å; {result['ms_per_step']:.2f} ms/step"


def describe_iteration(entry: dict[str, Any]) -> str:
    """One line about errors, steps and coverage of an iteration."""
    parts = [f"{entry['labels']} labels"]
    for name in ("valid", "test"):
        if name in entry:
            errors = entry[name]
            parts.append(f"{name} {errors['energy_rmse_mev_per_atom']:.2f} meV/atom, {errors['force_rmse']:.3f} eV/Å")
    parts.append(f"{entry['md_steps']} MD steps")
    if entry.get("coverage") is not None:
        parts.append(f"coverage {entry['coverage']:.3f}")
    return "; ".join(parts)
