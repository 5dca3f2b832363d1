"""Live progress of a run: bars on a terminal, plain lines everywhere else. A listener for `ubmd.learning.run`."""

from __future__ import annotations

from rich.console import Console
from rich.progress import TaskID

from ubmd.cli.live import Bars, Lines, describe_any_run, joined, place
from ubmd.cli.run_status import cell
from ubmd.learning.loop.timeline import Timeline, describe_work
from ubmd.runs.event_records import (
    Epoch,
    Event,
    IterationDone,
    LabelDone,
    MDSteps,
    ReplicaDone,
    RunDone,
    RunStarted,
    StageDone,
    StageStarted,
)
from ubmd.runs.stage_names import stage_name
from ubmd.texts import duration, to_go


class ProgressLines(Lines[Timeline]):
    """One plain line per notable event, and now and then one on the progress of a long stage."""

    def _describe(self, event: Event) -> str:
        return describe_event(event)

    def _how_far(self, event: Event) -> str:
        match event:
            case Epoch():
                stage = "train"
            case MDSteps():
                stage = "md"
            case LabelDone(event="label_done"):
                stage = "label"
            case _:
                return ""
        timeline = self._timeline
        line = f"{place(event)}{stage_name(stage)}: {describe_work(stage, timeline.work.get(stage))}"
        return line + joined(to_go(timeline.stage_left(stage)), to_go(timeline.run_left(), "run: "))


class ProgressBars(Bars[Timeline]):
    """The lines of `ProgressLines` above live bars: labels of the run, and the work of each running stage."""

    def __init__(self, console: Console, timeline: Timeline) -> None:
        super().__init__(console, timeline, ProgressLines, width=32)
        self._labels: TaskID | None = None
        self._stages: dict[str, TaskID] = {}

    def _show(self, event: Event) -> None:
        line = self._timeline
        if isinstance(event, RunStarted) and self._labels is None:
            self._labels = self._bars.add_task("labels", total=line.wanted, left="")
        for stage in set(self._stages) - set(line.running):
            self._bars.remove_task(self._stages.pop(stage))
        for stage in line.running:
            self._show_stage(stage)
        if self._labels is not None:
            self._bars.update(self._labels, completed=line.labels, left=to_go(line.run_left(), "run: "))

    def _show_stage(self, stage: str) -> None:
        line = self._timeline
        if stage not in self._stages:
            where = f"iteration {line.iteration}: " if line.iteration >= 0 else ""
            self._stages[stage] = self._bars.add_task(where + stage_name(stage), total=None, left="")
        done, total = line.work.get(stage, (0, 0))
        left = to_go(line.stage_left(stage))
        self._bars.update(self._stages[stage], completed=done, total=total or None, left=left)


def make_progress(console: Console, timeline: Timeline) -> ProgressBars | ProgressLines:
    """The listener that suits the console; use it in a ``with`` block."""
    return ProgressBars(console, timeline) if console.is_terminal else ProgressLines(console, timeline)


def describe_event(event: Event) -> str:
    """One line about an event, or an empty text if it is not worth a line."""
    match event:
        case RunStarted():
            return f"Run to {event.labels_wanted} labels."
        case StageStarted() if event.stage in ("test_set", "train", "md"):
            return f"{place(event)}{stage_name(event.stage)} …"
        case StageStarted() if event.stage == "label" and event.turn < 0:
            return f"{place(event)}{stage_name('label')} …"
        case StageDone() if event.stage == "train":
            return f"{place(event)}trained on {event.labels} labels in {duration(event.seconds)}."
        case ReplicaDone():
            return f"{place(event)}{describe_replica(event)}"
        case IterationDone():
            return f"{place(event)}{describe_iteration(event)}"
        case RunDone():
            return f"Done after {event.iterations} iterations. {event.reason}"
    return describe_any_run(event)


def describe_replica(event: ReplicaDone) -> str:
    """One line about how a replica ended."""
    text = f"replica {event.replica}: {event.steps} steps, {event.stopped}"
    if event.reason:
        text += f" ({event.reason})"
    return f"{text}; max u {event.max_u:.2f} eV/Å; {event.ms_per_step:.2f} ms/step"


def describe_iteration(event: IterationDone) -> str:
    """One line about errors, steps and coverage of an iteration."""
    parts = [f"{event.labels} labels"]
    for name, errors in (("valid", event.valid), ("test", event.test)):
        if errors is not None:
            energy, force, _ = errors.rmse
            parts.append(f"{name} {cell(energy, '.2f')} meV/atom, {cell(force, '.3f')} eV/Å{errors.behind}")
    parts.append(f"{event.md_steps} MD steps")
    if event.coverage is not None:
        parts.append(f"coverage {event.coverage:.3f}")
    return "; ".join(parts)
