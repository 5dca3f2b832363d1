"""What the live progress of both kinds of runs shares: lines and how they are printed, and the bars below them."""

from __future__ import annotations

import time
from typing import Any, Generic, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ubmd.learning.work.groups import describe_loss
from ubmd.runs.event_records import Event, LabelDone, Remark, TaskLost, read_event
from ubmd.runs.timeline import RunTimeline

SECONDS_BETWEEN_LINES = 30.0
"""Between two plain lines that only report the progress of a stage."""


T = TypeVar("T", bound=RunTimeline)


def place(event: Event) -> str:
    """How a line begins: the iteration or round, or what comes before the first one."""
    return f"[{event.turn:3d}] " if event.turn >= 0 else "[start] "


def describe_any_run(event: Event) -> str:
    """One line about an event that runs of both kinds have, or an empty text."""
    match event:
        case Remark():
            return f"Remark: {event.text}"
        case TaskLost():
            return f"{place(event)}{describe_loss(event)}"
        case LabelDone(event="label_rejected"):
            return f"{place(event)}label {event.index} rejected: {event.why}"
    return ""


def joined(*parts: str) -> str:
    """Parts that are known, as the end of a line."""
    return "".join(f"; {part}" for part in parts if part)


class Lines(Generic[T]):
    """One plain line per notable event, and now and then one on the progress of a long stage."""

    def __init__(self, console: Console, timeline: T, seconds_between: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = console
        self._timeline = timeline
        self._between = seconds_between
        self._last = time.monotonic()

    def __call__(self, values: dict[str, Any]) -> None:
        self.take(read_event(values))

    def take(self, event: Event) -> None:
        """Record an event, and print a line if it is worth one."""
        self._timeline.add(event)
        line = self._describe(event)
        if not line and time.monotonic() - self._last >= self._between:
            line = self._how_far(event)
        if line:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._last = time.monotonic()

    def _describe(self, event: Event) -> str:
        """One line about an event, or an empty text if it is not worth a line."""
        raise NotImplementedError

    def _how_far(self, event: Event) -> str:
        """The progress of the stage of an event, or an empty text if the event has none."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class Bars(Generic[T]):
    """Lines above live bars."""

    def __init__(self, console: Console, timeline: T, lines: type[Lines[T]], width: int) -> None:
        """``width``: characters of the bars' names."""
        self._bars = Progress(
            TextColumn(f"{{task.description:{width}}}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
        )
        self._timeline = timeline
        self._lines = lines(self._bars.console, timeline, seconds_between=float("inf"))

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, values: dict[str, Any]) -> None:
        event = read_event(values)
        self._lines.take(event)
        self._show(event)

    def _show(self, event: Event) -> None:
        """Update the bars; the timeline has the event already."""
        raise NotImplementedError
