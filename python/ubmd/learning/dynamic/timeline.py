"""Where a dynamic run stands and how long it still takes, worked out from its events."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ubmd.runs.event_records import Event, LabelAppended, LabelDone, MDSteps, RoundDone, RunStarted
from ubmd.runs.timeline import RunTimeline
from ubmd.settings.dynamic import DynamicRunSettings


class DynamicTimeline(RunTimeline):
    """What the events of every run say, and those of a dynamic run: labels, MD steps, and how long they take.

    Attributes:
        wanted: maximum number of labels requested. calls: labels requested. round: the current one.
        steps, steps_wanted: of all replicas.
    """

    def __init__(self, settings: DynamicRunSettings, events: Iterable[Event] = ()) -> None:
        super().__init__(settings.dynamic.labels)
        self.steps_wanted = settings.dynamic.steps * settings.dynamic.trajectories
        self.calls = self.steps = self.round = 0
        self._settled = 0  # steps of finished rounds
        self._begun: tuple[float, int] | None = None  # time and steps when this driver began to move
        self.follow(events)
        self._begun = None

    def add(self, event: Event) -> None:
        """Record an event."""
        super().add(event)
        self.round = max(self.round, event.turn)
        match event:
            case RunStarted(steps_wanted=int(wanted)):
                self.steps_wanted = wanted
            case LabelDone():
                self.calls += 1
            case LabelAppended():
                self.labels = max(self.labels, event.label + 1)
            case MDSteps():
                self.steps = self._settled + sum(event.steps)
                self._begun = self._begun or (time.monotonic(), self.steps)
            case RoundDone():
                self.steps = self._settled = event.md_steps
                self.calls = max(self.calls, event.calls)

    def left(self) -> float | None:
        """Time to the end of all trajectories at the pace of this driver, labels and refits included, s."""
        if self._begun is None or self.steps <= self._begun[1]:
            return None
        pace = (time.monotonic() - self._begun[0]) / (self.steps - self._begun[1])
        return pace * (self.steps_wanted - self.steps)
