"""What `ubmd status` says of runs of both kinds: why one is not running, losses, and how its table looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ubmd.learning.work.groups import describe_losses
from ubmd.runs.event_records import TaskLost
from ubmd.runs.folder import RunFolder
from ubmd.runs.timeline import RunTimeline
from ubmd.texts import duration


@dataclass(frozen=True)
class Row:
    """A run among several."""

    run: str
    state: str
    turn: str
    """iteration or round"""
    labels: str
    valid: str
    test: str
    left: str


_TITLES = {
    "run": "run",
    "state": "state",
    "turn": "iter.",
    "labels": "labels",
    "valid": "valid E meV/atom,\nF eV/Å (structures)",
    "test": "test E meV/atom,\nF eV/Å (structures)",
    "left": "left",
}

SHOWN = 12
"""Newest rows in the table."""

_AGAIN = "it would stop there again: change what the message names first, then 'ubmd run' resumes it"
_CAUSE = "once the cause is fixed, 'ubmd run' with the same settings resumes it"
# What to do after an error that would recur by itself; after others the same command simply resumes the run.
_ADVICE = {
    "SettingsError": _AGAIN,
    "DataError": _AGAIN,
    "TrainingError": _AGAIN,
    "ModelError": _CAUSE,
    "SimulationError": _CAUSE,
    "MachineError": _CAUSE,
}


def page(
    folder: RunFolder, state: str, lines: Iterable[str], losses: Sequence[TaskLost], below: Iterable[RenderableType]
) -> Group:
    """The folder with its state, further lines, processes that were lost, and what stands below."""
    texts = [f"{folder.path}: {state}", *lines, *describe_losses(losses)]
    return Group(*(Text(text) for text in texts), *below)


def describe_idle(run: RunTimeline, doing: str = "") -> str:
    """One sentence on a run that is not running: finished, ended with an error, or dead (``doing``: in what)."""
    if run.finished:
        return f"finished. {run.finished}"
    resume = "'ubmd run' with the same settings resumes it"
    if run.stopped:
        return f"stopped ({run.stopped.rstrip('.')}); {_ADVICE.get(run.error, resume)}"
    if run.last_event is None:
        return f"not started; {resume}"
    ago = duration(max(0.0, (datetime.now(UTC) - run.last_event).total_seconds()))
    return f"stopped: its process {run.process} is gone{doing}, last seen {ago} ago; {resume}"


def overview(rows: Sequence[Row]) -> Table:
    """One row per run."""
    columns = {title: [getattr(row, name) for row in rows] for name, title in _TITLES.items()}
    table = make_table(columns)
    for column in table.columns[:2]:
        column.justify, column.overflow = "left", "fold"
    return table


def brief_state(run: RunTimeline, running: bool) -> str:
    """The state of a run in a word or two."""
    if running:
        return "running"
    if run.finished:
        return "finished"
    if run.stopped:
        return f"stopped ({run.error or run.stopped})"
    return "not started" if run.last_event is None else "process gone"


def errors_in_row(energy: float | None, force: float | None, behind: int | None) -> str:
    """'0.05, 0.018 (4)': errors of energy and forces, and the number of structures."""
    if force is None:
        return ""
    values = [cell(energy, ".2f")] * (energy is not None) + [cell(force, ".3f")]
    return ", ".join(values) + (f" ({behind})" if behind is not None else "")


def since(begin: datetime) -> str:
    """'since 3 min': how long ago something began."""
    return f"since {duration((datetime.now(UTC) - begin).total_seconds())}"


def make_table(columns: Mapping[str, Sequence[str]]) -> Table:
    """Titles over their cells; columns without any value are left out."""
    shown = {title: cells for title, cells in columns.items() if any(cell not in ("", "-") for cell in cells)}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in shown:
        table.add_column(title, justify="right")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def cell(value: float | None, form: str) -> str:
    """A number of a history, '-' where it has none; unlike in reports, one that is not finite is shown."""
    return "-" if value is None else format(value, form)
