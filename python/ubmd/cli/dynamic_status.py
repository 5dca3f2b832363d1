"""What `ubmd status` says about a dynamic run."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ubmd.cli.run_status import (
    SHOWN,
    Row,
    brief_state,
    cell,
    describe_idle,
    errors_in_row,
    make_table,
    page,
    since,
)
from ubmd.learning.dynamic.timeline import DynamicTimeline
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings_of
from ubmd.runs.reading import newest_rounds, read_events
from ubmd.runs.records import Fit, ForceErrors, RoundEntry
from ubmd.runs.stage_names import stage_name
from ubmd.settings.dynamic import DynamicRunSettings
from ubmd.texts import duration


def status(run_dir: Path) -> RenderableType:
    """State and one table of the refits of a dynamic run.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings = read_settings_of(folder, DynamicRunSettings)
    timeline, running = DynamicTimeline(settings, read_events(folder)), folder.is_locked()
    lines = [
        f"{timeline.labels} labels, {timeline.calls} of at most {timeline.wanted} reference calculations; "
        f"{timeline.steps:,} of at most {timeline.steps_wanted:,} MD steps."
    ]
    if running and timeline.running:
        doing = [f"{stage_name(stage)} {since(begin)}" for stage, begin in timeline.running.items()]
        lines.append(f"Round {timeline.round}: {', '.join(doing)}.")
    rounds, below = newest_rounds(folder), list[RenderableType]()
    for last in islice(rounds, 1):
        refits = list(islice((entry for entry in chain([last], rounds) if entry.refit), SHOWN))
        below = [_table(refits[::-1]), *(Text(signal.reason) for signal in last.signals)]
    return page(folder, "running" if running else describe_idle(timeline), lines, timeline.lost, below)


def row(run_dir: Path) -> Row:
    """The same in one row of a table of several runs.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings = read_settings_of(folder, DynamicRunSettings)
    timeline, running = DynamicTimeline(settings, read_events(folder)), folder.is_locked()
    last = next(newest_rounds(folder), None)
    errors = last.test if last else None
    seconds = timeline.left() if running else None
    return Row(
        run=str(run_dir),
        state=brief_state(timeline, running),
        turn=str(timeline.round) if timeline.round >= 0 else "",
        labels=f"{timeline.labels} of {timeline.wanted}",
        valid="",
        test=errors_in_row(errors.energy_rmse_mev_per_atom, errors.force_rmse, errors.structures) if errors else "",
        left="" if seconds is None else f"at most {duration(seconds)}",
    )


def _table(refits: list[RoundEntry]) -> Table:
    """One row per refit."""
    columns = {
        "round": [str(entry.round) for entry in refits],
        "labels": [str(entry.labels) for entry in refits],
        "MD\nsteps": [f"{entry.md_steps:,}" for entry in refits],
        "predicted\neV/Å": [_worst(row.error_before for row in entry.learnt) for entry in refits],
        "true\neV/Å": [_worst(row.true_before for row in entry.learnt) for entry in refits],
        "noise\neV/Å": [cell(entry.model.noise or None, ".3g") for entry in refits],
        "determined\n%": [_determined(entry.model) for entry in refits],
        "train F\n%": [_percent(entry.train) for entry in refits],
        "test F\n%": [_percent(entry.test) for entry in refits],
        "test\nstruct.": [str(entry.test.structures) if entry.test else "" for entry in refits],
    }
    return make_table(columns)


def _worst(errors: Iterable[float | None]) -> str:
    """Of the labels that a refit has learnt."""
    return cell(max((error for error in errors if error is not None), default=None), ".3g")


def _determined(model: Fit) -> str:
    if not model.gamma:
        return "-"
    return f"{100 * sum(model.gamma.values()) / sum(model.parameters.values()):.0f}"


def _percent(errors: ForceErrors | None) -> str:
    share = errors.relative if errors else None
    return "-" if share is None else f"{100 * share:.2f}"
