"""Where a run stands and how long it still takes, worked out from its events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from ubmd.runs.event_records import (
    Epoch,
    Event,
    IterationDone,
    LabelAppended,
    LabelDone,
    MDSteps,
    RunDone,
    RunStarted,
    StageDone,
    StageStarted,
    TaskLost,
)
from ubmd.runs.timeline import RunTimeline
from ubmd.settings import RunSettings

_RECENT = 3  # iterations that an estimate looks back at


class Timeline(RunTimeline):
    """What the events of every run say, and those of a loop: labels, work of the stages, and how long they take.

    Attributes:
        rejected: structures without a label. iteration: the current one, -1 before the loop.
        work: stage -> (done, all) in whatever the stage counts.
    """

    def __init__(self, settings: RunSettings, events: Iterable[Event] = ()) -> None:
        super().__init__(settings.loop.labels)
        self.settings = settings
        self.rejected = 0
        self.iteration = -1
        self.work: dict[str, tuple[int, int]] = {}
        self._seconds: dict[int, dict[str, float]] = {}
        self._labels_of: dict[int, int] = {}  # iteration -> labels that its model was trained on
        self.follow(events)

    def add(self, event: Event) -> None:
        """Record an event."""
        super().add(event)
        match event:
            case RunStarted():
                self.work.clear()
            case StageStarted():
                self._start(event)
            case StageDone():
                self._seconds.setdefault(event.turn, {})[event.stage] = float(event.seconds)
                self.work.pop(event.stage, None)
            case Epoch():
                self.work["train"] = (event.epoch, event.epochs)
            case MDSteps(limit=int(limit)):
                self.work["md"] = (sum(event.steps), limit * len(event.steps))
            case LabelDone():
                self.rejected += event.event == "label_rejected"
                self._count_label()
            case TaskLost(what="label", again=False, crashed=False):
                self._count_label()
            case LabelAppended():
                self.labels = event.label + 1
            case IterationDone() | RunDone():
                self.labels = max(self.labels, event.labels)

    def _start(self, event: StageStarted) -> None:
        self.iteration = event.turn
        self.work.pop(event.stage, None)
        if event.labels is not None:
            # Also fewer than before, after `ubmd run --from`.
            self.labels = self._labels_of[self.iteration] = event.labels
        if event.stage == "label":
            self.work["label"] = (0, self._batch())

    def _count_label(self) -> None:
        """One structure of the batch is finished."""
        done, total = self.work.get("label", (0, self._batch()))
        self.work["label"] = (min(done + 1, total), total)

    def _batch(self) -> int:
        """Structures in the batch that is being labelled."""
        if self.iteration < 0:
            return self.settings.start.count
        return max(1, min(self.settings.selection.batch, self.wanted - self.labels))

    # -------------------------------------------------------------------------------------- estimates

    def stage_left(self, stage: str, now: datetime | None = None) -> float | None:
        """Time that a running stage still takes, s; None if nothing is known yet."""
        elapsed = self._elapsed(stage, now)
        done, total = self.work.get(stage, (0, 0))
        by_work = elapsed * (total - done) / done if done else None
        if stage == "train" and by_work is not None:
            return by_work
        expected = self._expected(stage)
        if expected is None or elapsed > expected:
            return by_work
        # Replicas may stop long before their step limit: earlier iterations tell more, up to what is left to do.
        left = expected - elapsed
        return left if by_work is None else min(left, by_work)

    def run_left(self, now: datetime | None = None) -> float | None:
        """Time to the end of the run, s; None before the first iteration has ended."""
        cycle = [self._expected(stage) for stage in ("md", "select", "label", "export", "measure")]
        if cycle[0] is None or self._training(1, 1) is None:
            return None
        other = sum(seconds or 0.0 for seconds in cycle)
        batch = self._growth()
        begun = self._labels_of.get(self.iteration, self.labels)
        remaining = math.ceil(max(0.0, self.wanted - begun) / max(batch, 0.1))
        trained = sum(self._training(min(self.wanted, begun + k * batch), batch) or 0.0 for k in range(remaining + 1))
        spent = sum(self._seconds.get(self.iteration, {}).values())
        spent += sum(self._elapsed(stage, now) for stage in self.running)
        current = max((self.stage_left(stage, now) or 0.0 for stage in self.running), default=0.0)
        return max(trained + remaining * other - spent, current)

    def _elapsed(self, stage: str, now: datetime | None) -> float:
        if stage not in self.running:
            return 0.0
        return max(0.0, ((now or datetime.now(UTC)) - self.running[stage]).total_seconds())

    def _expected(self, stage: str) -> float | None:
        """What a stage takes, from the last iterations."""
        if stage == "train":
            labels = self._labels_of.get(self.iteration, self.labels)
            return self._training(labels, labels - self._labels_of.get(self.iteration - 1, labels))
        known = [s[stage] for k, s in sorted(self._seconds.items()) if k >= 0 and stage in s]
        return sum(known[-_RECENT:]) / len(known[-_RECENT:]) if known else None

    def _training(self, labels: float, new: float) -> float | None:
        """Seconds to train on so many labels: proportional to labels and epochs, like the last trainings.

        ``new``: labels that the last model has not seen.
        """
        rates = [
            seconds["train"] / (self._labels_of[k] * self.epochs(k))
            for k, seconds in sorted(self._seconds.items())
            if "train" in seconds and self._labels_of.get(k)
        ][-_RECENT:]
        if not rates:
            return None
        epochs = self.settings.epochs(labels, new if self.settings.loop.warm_start else None)
        return labels * epochs * sum(rates) / len(rates)

    def epochs(self, iteration: int) -> int:
        """Epochs of an iteration's training."""
        labels = self._labels_of.get(iteration, self.labels)
        warm = self.settings.loop.warm_start and iteration > 0
        before = self._labels_of.get(iteration - 1) if warm else None
        if iteration == 0 and self.settings.start.model is not None:
            before = 0
        return self.settings.epochs(labels, None if before is None else labels - before)

    def _growth(self) -> float:
        """New labels per iteration, as in the last ones; before that, what a batch would give."""
        sizes = [labels for _, labels in sorted(self._labels_of.items())][-_RECENT - 1 :]
        if len(sizes) > 1 and sizes[-1] > sizes[0]:
            return (sizes[-1] - sizes[0]) / (len(sizes) - 1)
        share = self.labels / (self.labels + self.rejected) if self.labels else 1.0
        return self.settings.selection.batch * share


def describe_work(stage: str, work: Sequence[int] | None) -> str:
    """How far a stage is: 'epoch 3 of 200'."""
    if not work or not work[1]:
        return ""
    done, total = work
    match stage:
        case "train":
            return f"epoch {done} of {total}"
        case "md":
            return f"{done:,} of at most {total:,} MD steps"
        case "label":
            return f"{done} of {total} structures"
    return f"{done} of {total}"
