"""What the live progress of both kinds of runs shares: how lines are printed, and how bars stand below them."""

from __future__ import annotations

import time
from typing import Generic, Protocol, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ubmd.runs.folder import Event

SECONDS_BETWEEN_LINES = 30.0
"""Between two plain lines that only say how far a stage is."""


class Follower(Protocol):
    """Follows the events of a run."""

    def add(self, event: Event) -> None:
        """Take note of an event."""


F = TypeVar("F", bound=Follower)


class Lines(Generic[F]):
    """One plain line per thing worth knowing, and now and then one that says how far a long stage is."""

    def __init__(self, console: Console, course: F, seconds_between: float = SECONDS_BETWEEN_LINES) -> None:
        self._console = console
        self._course = course
        self._between = seconds_between
        self._last = time.monotonic()

    def __call__(self, event: Event) -> None:
        self._course.add(event)
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
        """How far the stage of an event is, or an empty text if the event doesn't tell."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class Bars(Generic[F]):
    """Lines above live bars."""

    def __init__(self, console: Console, course: F, lines: type[Lines[F]], width: int) -> None:
        """``width``: characters of the bars' names."""
        self._bars = Progress(
            TextColumn(f"{{task.description:{width}}}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
        )
        self._course = course
        self._lines = lines(self._bars.console, course, seconds_between=float("inf"))

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        self._lines(event)
        self._show(event)

    def _show(self, event: Event) -> None:
        """Bring the bars up to date; the course knows the event already."""
        raise NotImplementedError
