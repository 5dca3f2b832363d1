"""What `ubmd status` says about a dynamic run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ubmd.cli.run_status import SHOWN, cell, describe_idle, make_table, page, since
from ubmd.learning.dynamic.timeline import STAGE_NAMES, DynamicTimeline
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings_of
from ubmd.settings.dynamic import DynamicRunSettings


def status(run_dir: Path) -> RenderableType:
    """State and one table of the refits of a dynamic run.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings = read_settings_of(folder, DynamicRunSettings)
    events = folder.read_events()
    timeline, running = DynamicTimeline(settings, events), folder.is_locked()
    lines = [
        f"{timeline.labels} labels, {timeline.calls} of at most {timeline.wanted} structures asked for; "
        f"{timeline.steps:,} of at most {timeline.steps_wanted:,} MD steps."
    ]
    if running and timeline.running:
        doing = [f"{STAGE_NAMES.get(stage, stage)} {since(begin)}" for stage, begin in timeline.running.items()]
        lines.append(f"Round {timeline.round}: {', '.join(doing)}.")
    history, below = folder.read_history(), list[RenderableType]()
    if history:
        refits = [entry for entry in history if entry["refit"]]
        below = [_table(refits[-SHOWN:]), *(Text(signal["reason"]) for signal in history[-1]["signals"])]
    return page(folder, "running" if running else describe_idle(timeline), lines, events, below)


def _table(refits: list[dict[str, Any]]) -> Table:
    """One row per refit."""
    columns = {
        "round": [str(entry["round"]) for entry in refits],
        "labels": [str(entry["labels"]) for entry in refits],
        "MD\nsteps": [f"{entry['md_steps']:,}" for entry in refits],
        "predicted\neV/Å": [_newest(entry, "error_before") for entry in refits],
        "true\neV/Å": [_newest(entry, "true_before") for entry in refits],
        "noise\neV/Å": [cell(entry["model"]["noise"] or None, ".3g") for entry in refits],
        "determined\n%": [_determined(entry["model"]) for entry in refits],
        "train F\n%": [_percent(entry.get("train")) for entry in refits],
        "test F\n%": [_percent(entry.get("test")) for entry in refits],
    }
    return make_table(columns)


def _newest(entry: dict[str, Any], name: str) -> str:
    """Of the worst label that this refit has learnt."""
    values = [row[name] for row in entry["learnt"] if row[name] is not None]
    return cell(max(values, default=None), ".3g")


def _determined(model: dict[str, Any]) -> str:
    if not model.get("gamma"):
        return "-"
    return f"{100 * sum(model['gamma'].values()) / sum(model['parameters'].values()):.0f}"


def _percent(errors: dict[str, Any] | None) -> str:
    share = (errors or {}).get("relative")
    return "-" if share is None else f"{100 * share:.2f}"
