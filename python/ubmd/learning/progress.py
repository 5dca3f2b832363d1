"""Live progress of a run: bars on a terminal, plain lines everywhere else. A listener for `ubmd.learning.run`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ubmd.learning.run_folder import Event

_STAGES = {
    "test_set": "reference MD for the test set",
    "label": "labels",
    "train": "training",
    "export": "calibration and export",
    "measure": "errors",
    "md": "biased MD",
    "select": "selection",
}


class ProgressLines:
    """One plain line per thing worth knowing."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        line = describe_event(event)
        if line:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class ProgressBars:
    """The lines of `ProgressLines` above two live bars: labels of the run, work of the stage."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._lines = ProgressLines(self._bars.console)
        self._labels: TaskID | None = None
        self._stage: TaskID | None = None

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        self._lines(event)
        match event["event"]:
            case "run_started":
                self._labels = self._bars.add_task("labels", total=event["labels_wanted"])
            case "stage_started":
                self._start_stage(event)
            case "epoch":
                self._update_stage(event["epoch"], event["epochs"])
            case "md_steps":
                self._update_stage(sum(event["steps"]), event["limit"] * len(event["steps"]))
            case "label_done" if self._stage is not None:
                self._bars.advance(self._stage)
            case "label_appended" if self._labels is not None:
                self._bars.update(self._labels, completed=event["label"] + 1)
            case "iteration_done" if self._labels is not None:
                self._bars.update(self._labels, completed=event["labels"])

    def _start_stage(self, event: Event) -> None:
        if self._stage is not None:
            self._bars.remove_task(self._stage)
        where = "" if event.get("iteration", -1) < 0 else f"iteration {event['iteration']}: "
        self._stage = self._bars.add_task(where + _STAGES[event["stage"]], total=None)

    def _update_stage(self, completed: int, total: int) -> None:
        if self._stage is not None:
            self._bars.update(self._stage, completed=completed, total=total)


def make_progress(console: Console) -> ProgressBars | ProgressLines:
    """The listener that suits the console; use it in a ``with`` block."""
    return ProgressBars(console) if console.is_terminal else ProgressLines(console)


def describe_event(event: Event) -> str:
    """One line about an event, or an empty text if it is not worth a line."""
    match event["event"]:
        case "run_started":
            return f"Run to {event['labels_wanted']} labels."
        case "stage_started" if event["stage"] in ("test_set", "train", "md"):
            return f"{_place(event)}{_STAGES[event['stage']]} …"
        case "stage_done" if event["stage"] == "train":
            return f"{_place(event)}trained on {event['labels']} labels in {event['seconds']:.0f} s."
        case "replica_done":
            return f"{_place(event)}{describe_replica(event)}"
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


def estimate_seconds(history: Sequence[dict[str, Any]], labels: int, wanted: int, batch: int) -> float | None:
    """Time to go (s): iterations to go times the mean of the last three; None before the first has ended."""
    finished = [sum(entry["seconds"].values()) for entry in history if entry["replicas"]][-3:]
    if not finished:
        return None
    return math.ceil(max(0, wanted - labels) / batch) * sum(finished) / len(finished)
