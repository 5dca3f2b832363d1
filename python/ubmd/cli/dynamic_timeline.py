"""Where a dynamic run stands and how long it still takes, worked out from its events."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime

from ubmd.runs.folder import Event
from ubmd.settings.dynamic import DynamicRunSettings

STAGE_NAMES = {"learn": "training", "measure": "errors", "move": "MD", "label": "labels", "test_set": "test set"}


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
