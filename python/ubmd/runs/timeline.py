"""What the events of a run of either kind say: which process runs it, its stages since when, why it ended."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime

from ubmd.errors import DataError
from ubmd.runs.event_records import Event, RunDone, RunStarted, RunStopped, StageDone, StageStarted, TaskLost


class RunTimeline:
    """Follows the events of a run, those in its file or those that happen now; each kind of run adds what it counts.

    Attributes:
        wanted: labels that the run is to have. labels: in the data set. running: stage -> when it began.
        process: number of the driver's process, if its start is known. last_event: time of the newest event.
        stopped: why the driver ended, as far as it could say; empty while it runs or if it was killed.
        error: class of the error that stopped it; empty if none did, or in runs of older versions.
        finished: the stop rule that ended the run, or empty.
        lost: processes that were lost since the newest start.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.labels = 0
        self.running: dict[str, datetime] = {}
        self.process: int | None = None
        self.finished = self.stopped = self.error = ""
        self.last_event: datetime | None = None
        self.lost: list[TaskLost] = []

    def follow(self, events: Iterable[Event]) -> None:
        """Record the events of a file, which may be old or damaged."""
        for event in events:
            with suppress(DataError, TypeError, ValueError):
                self.add(event)

    def add(self, event: Event) -> None:
        """Record an event."""
        time = datetime.fromisoformat(event.time) if event.time else datetime.now(UTC)
        if event.time:
            self.last_event = time
        match event:
            case RunStarted():
                self.running.clear()
                self.process = event.process
                self.wanted = self.wanted if event.labels_wanted is None else event.labels_wanted
                self.finished = self.stopped = ""
                self.lost.clear()
            case TaskLost():
                self.lost.append(event)
            case StageStarted():
                self.running[event.stage] = time
            case StageDone():
                self.running.pop(event.stage, None)
            case RunStopped():
                self.stopped, self.error = event.why or "", event.kind or ""
            case RunDone():
                self.finished = event.reason
                self.running.clear()
