"""What `ubmd status` says about a dynamic run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ubmd.cli.loop_status import describe_idle, is_running
from ubmd.learning.dynamic.timeline import STAGE_NAMES, DynamicTimeline
from ubmd.learning.work.groups import describe_losses
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings_of
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.texts import duration

_SHOWN = 12  # newest refits in the table


def status(run_dir: Path) -> RenderableType:
    """State and one table of the refits of a dynamic run.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings = read_settings_of(folder, DynamicRunSettings)
    events = folder.read_events()
    course, running = DynamicTimeline(settings, events), is_running(folder)
    lines = [
        f"{folder.path}: {'running' if running else describe_idle(course)}",
        f"{course.labels} labels, {course.calls} of at most {course.wanted} structures asked for; "
        f"{course.steps:,} of at most {course.steps_wanted:,} MD steps.",
    ]
    if running and course.running:
        now = datetime.now(UTC)
        doing = [
            f"{STAGE_NAMES.get(s, s)} since {duration((now - t).total_seconds())}" for s, t in course.running.items()
        ]
        lines.append(f"Round {course.round}: {', '.join(doing)}.")
    lines += describe_losses(events)
    history = folder.read_history()
    parts: list[RenderableType] = [Text(line) for line in lines]
    if history:
        parts.append(_table([entry for entry in history if entry["refit"]][-_SHOWN:]))
        parts += [Text(signal["reason"]) for signal in history[-1]["signals"]]
    return Group(*parts)


def _table(refits: list[dict[str, Any]]) -> Table:
    """One row per refit; columns that no refit has are left out."""
    columns: dict[str, list[str]] = {
        "round": [str(entry["round"]) for entry in refits],
        "labels": [str(entry["labels"]) for entry in refits],
        "MD\nsteps": [f"{entry['md_steps']:,}" for entry in refits],
        "predicted\neV/Å": [_newest(entry, "error_before") for entry in refits],
        "true\neV/Å": [_newest(entry, "true_before") for entry in refits],
        "noise\neV/Å": [_number(entry["model"]["noise"] or None, ".3g") for entry in refits],
        "determined\n%": [_determined(entry["model"]) for entry in refits],
        "train F\n%": [_percent(entry.get("train")) for entry in refits],
        "test F\n%": [_percent(entry.get("test")) for entry in refits],
    }
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, cells in list(columns.items()):
        if all(cell in ("", "-") for cell in cells):
            del columns[name]
        else:
            table.add_column(name, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _newest(entry: dict[str, Any], name: str) -> str:
    """Of the worst label that this refit has learnt."""
    values = [row[name] for row in entry["learnt"] if row[name] is not None]
    return _number(max(values, default=None), ".3g")


def _determined(model: dict[str, Any]) -> str:
    if not model.get("gamma"):
        return "-"
    return f"{100 * sum(model['gamma'].values()) / sum(model['parameters'].values()):.0f}"


def _percent(errors: dict[str, Any] | None) -> str:
    share = (errors or {}).get("relative")
    return "-" if share is None else f"{100 * share:.2f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
