"""What `ubmd status` says: read from the run folder, also while another process works in it."""

from __future__ import annotations

import fcntl
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ubmd.learning.progress import estimate_seconds
from ubmd.learning.run_folder import Event, RunFolder, read_settings
from ubmd.settings import RunSettings

_SHOWN = 12  # newest iterations in the table


def status(run_dir: Path) -> RenderableType:
    """State, stage, labels, replicas, table of iterations and time to go of a run.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings, events, history = read_settings(folder), folder.read_events(), folder.read_history()
    lines = [f"{folder.path}: {_state(folder, events)}", _labels(events, settings)]
    if events and events[-1]["event"] != "run_done":
        lines += [_stage(events), *_replicas(folder, settings)]
        seconds = estimate_seconds(history, _label_count(events), settings.loop.labels, settings.selection.batch)
        if seconds is not None:
            lines.append(f"About {_duration(seconds)} to go.")
    return Group(*(Text(line) for line in lines if line), _table(history[-_SHOWN:]))


def is_running(folder: RunFolder) -> bool:
    """Whether a process holds the run's lock."""
    lock = folder.path / ".lock"
    if not lock.exists():
        return False
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _state(folder: RunFolder, events: list[Event]) -> str:
    if is_running(folder):
        return "running"
    if events and events[-1]["event"] == "run_done":
        return f"finished. {events[-1]['reason']}"
    return "stopped; 'ubmd run' with the same settings resumes it"


def _label_count(events: list[Event]) -> int:
    return max((event["label"] + 1 for event in events if event["event"] == "label_appended"), default=0)


def _labels(events: list[Event], settings: RunSettings) -> str:
    rejected = sum(event["event"] == "label_rejected" for event in events)
    return f"{_label_count(events)} of {settings.loop.labels} labels, {rejected} rejected."


def _stage(events: list[Event]) -> str:
    started = [event for event in events if event["event"] == "stage_started"]
    if not started:
        return ""
    iteration = started[-1].get("iteration", -1)
    where = f"Iteration {iteration}" if iteration >= 0 else "Start"
    return f"{where}, stage {started[-1]['stage']}, since {started[-1]['time']}."


def _replicas(folder: RunFolder, settings: RunSettings) -> list[str]:
    """Steps of the replicas that are running."""
    iterations = folder.iterations()
    files = sorted(iterations[-1].glob("frames_*.progress")) if iterations else []
    return [f"  replica {int(f.stem[-3:])}: {f.read_text()} of {settings.md.steps} steps" for f in files if f.exists()]


def _table(history: list[dict]) -> Table:
    table = Table(title="iterations" if history else None)
    for column in ("iteration", "labels", "MD steps", "valid F eV/Å", "test E meV/atom", "test F eV/Å", "coverage"):
        table.add_column(column, justify="right")
    for entry in history:
        test = entry.get("test", {})
        table.add_row(
            str(entry["iteration"]),
            str(entry["labels"]),
            str(entry["md_steps"]),
            _number(entry["valid"]["force_rmse"]),
            _number(test.get("energy_rmse_mev_per_atom")),
            _number(test.get("force_rmse")),
            _number(entry.get("coverage")),
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
