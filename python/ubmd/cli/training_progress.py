"""Progress of a training, a fit or an evaluation: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ubmd.texts import countdown, counted, to_go

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from ubmd.potentials.force_constants.fit import Progress

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


@contextmanager
def training_progress(console: Console, counts: Mapping[str, int]) -> Iterator[Any]:
    """A callback for every epoch: a live bar on a terminal, a line now and then elsewhere.

    ``counts``: structures that errors are measured on, 'train' and 'valid'.
    """
    if not console.is_terminal:
        yield _PlainProgress(console, counts)
        return
    with _bars(console, "epochs, {task.description}") as bar:
        task = bar.add_task("starting", total=None)

        def report(row: dict[str, Any]) -> None:
            bar.update(task, completed=row["epoch"], total=row["epochs"], description=_errors_text(row, counts))

        yield report


@contextmanager
def count_progress(console: Console, transient: bool = False) -> Iterator[Progress]:
    """A callback (what, done, of how many): live bars on a terminal, a line now and then elsewhere.

    ``transient``: the bars vanish at the end.
    """
    if not console.is_terminal:
        begin = last = time.monotonic()

        def line(what: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > SECONDS_BETWEEN_LINES:
                last = now
                left = (now - begin) / done * (total - done) if done else None
                text = f"{done} of {total} {what}, {now - begin:.0f} s{to_go(left, ', ')}"
                console.print(text, soft_wrap=True, highlight=False)

        yield line
        return
    with _bars(console, "{task.description}", transient) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield report


def _bars(console: Console, text: str, transient: bool = False) -> Bars:
    """Bars with how much is done, a text, and the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TextColumn(text), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=transient)


class _PlainProgress:
    """Lines with the errors and the time left: the first epoch, every ten seconds, the last epoch."""

    def __init__(self, console: Console, counts: Mapping[str, int]) -> None:
        self._console = console
        self._counts = counts
        self._start: float | None = None
        self._first_epoch = 0
        self._last_line = -float("inf")

    def __call__(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start, self._first_epoch = now - row.get("seconds", 0.0), row["epoch"] - 1
        if now - self._last_line < SECONDS_BETWEEN_LINES and row["epoch"] < row["epochs"]:
            return
        self._last_line = now
        errors = _errors_text(row, self._counts)
        parts = [errors] if errors else []
        if now > self._start:  # a back end that does not say how long its first epoch took tells nothing yet
            left = (now - self._start) / (row["epoch"] - self._first_epoch) * (row["epochs"] - row["epoch"])
            parts.append(f"{countdown(left)} left")
        line = f"epoch {row['epoch']} of {row['epochs']}" + (f": {', '.join(parts)}" if parts else "")
        self._console.print(line, soft_wrap=True, highlight=False)


def _errors_text(row: dict[str, Any], counts: Mapping[str, int]) -> str:
    """Validation errors of an epoch in one line (training errors where there was no validation); empty without any."""
    part = "valid" if row.get("valid_force_rmse_eV_per_A") is not None else "train"
    values = [(text, row.get(f"{part}_{key}")) for text, key in _ERRORS]
    found = [text.format(value) for text, value in values if value is not None]
    return f"{part} {', '.join(found)} ({counted(counts[part], 'structure')})" if found else ""


_ERRORS = (
    ("E {:.2f} meV/atom", "energy_rmse_meV_per_atom"),
    ("F {:.4f} eV/Å", "force_rmse_eV_per_A"),
    ("S {:.1f} MPa", "stress_rmse_MPa"),
)
