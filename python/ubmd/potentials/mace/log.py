"""MACE's log of a training as that of every back end: a row per epoch in log.csv, their picture, a summary."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubmd.potentials.history import SECONDS_BETWEEN_PICTURES, Log, Row, draw, read
from ubmd.potentials.interface import Report, Summary

LOGS = ("log.csv", "learning_curve.png")
# name in a row: name in MACE's log, factor (eV/atom, eV/Å and eV/Å^3 there)
_ERRORS = {
    "valid_energy_rmse_meV_per_atom": ("rmse_e_per_atom", 1000.0),
    "valid_force_rmse_eV_per_A": ("rmse_f", 1.0),
    "valid_stress_rmse_MPa": ("rmse_stress", 160217.6634),
    "valid_energy_mae_meV_per_atom": ("mae_e_per_atom", 1000.0),
    "valid_force_mae_eV_per_A": ("mae_f", 1.0),
}


class Epochs:
    """Rows of epochs (see `ubmd.potentials.history.COLUMNS`) from MACE's log, line by line.

    A process that resumes begins with the epoch of its checkpoint: the rows from there on are made again. ``loss`` is
    the mean over mini-batches, ``seconds`` are those of training steps and validation.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._losses: list[float] = []
        self._open = False  # whether the last row may get more

    def add(self, line: bytes) -> Row | None:
        """Take a line; returns the row of its epoch if it is about a validation."""
        try:
            found = json.loads(line)
        except ValueError:
            found = {}
        if found.get("epoch") is None or found.get("mode") not in ("opt", "eval"):
            self._open = False  # MACE validates once before its first epoch
            return None
        row = self._row(int(found["epoch"]) + 1)
        row["seconds"] += found.get("time") or 0.0
        if found["mode"] == "opt":
            self._losses.append(found["loss"])
            row["loss"] = sum(self._losses) / len(self._losses)
            return None
        values = {name: (found.get(key), factor) for name, (key, factor) in _ERRORS.items()}
        row.update({name: value * factor for name, (value, factor) in values.items() if value is not None})
        return row

    def _row(self, epoch: int) -> Row:
        if not self._open or self.rows[-1]["epoch"] != epoch:
            self.rows = [row for row in self.rows if row["epoch"] < epoch]
            self.rows.append({"epoch": epoch, "seconds": 0.0, "best": 0})
            self._losses, self._open = [], True
        return self.rows[-1]


class Progress:
    """Reads MACE's log of a training while it grows: reports epochs, and keeps `LOGS` up to date."""

    def __init__(self, work: Path, tag: str, epochs: int, folder: Path, report: Report | None) -> None:
        """``work``: MACE's folder; ``tag``: of its files; ``epochs``: all; ``folder``: for the logs."""
        self.work, self.tag, self.epochs, self.folder, self.report = work, tag, epochs, folder, report
        self._log = work / "results" / f"{tag}_train.txt"
        self._read = 0
        self._found = Epochs()
        self._pictured = time.monotonic()
        self._take()  # what ran before an interruption

    def __call__(self) -> None:
        """Report what is new."""
        new = self._take()
        for row in new:
            if self.report is not None:
                self.report({**row, "epochs": self.epochs})
        if not new:
            return
        self._write()
        if time.monotonic() - self._pictured > SECONDS_BETWEEN_PICTURES:
            draw(self._found.rows, self.folder / LOGS[1])
            self._pictured = time.monotonic()

    def finish(self) -> None:
        """After the end of the training, while MACE's checkpoints are there."""
        self()
        self._write()
        draw(self._found.rows, self.folder / LOGS[1])

    def _take(self) -> list[Row]:
        """Rows of new validations; only whole lines count."""
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        rows = [self._found.add(line) for line in whole.splitlines()]
        return [row for row in rows if row is not None]

    def _write(self) -> None:
        kept = kept_epoch(self.work, self.tag)
        for row in self._found.rows:
            row["best"] = int(row["epoch"] == kept)
        Log(self.folder / LOGS[0], self._found.rows).close()


def kept_epoch(work: Path, tag: str) -> int | None:
    """The epoch (from 1) whose weights MACE takes: that of the last checkpoint, of stage two if it has come so far."""
    names = [path.name for path in (work / "checkpoints").glob(f"{tag}_epoch-*.pt")]
    for end in ("_swa.pt", ".pt"):
        found = [re.fullmatch(rf"{re.escape(tag)}_epoch-(\d+){re.escape(end)}", name) for name in names]
        epochs = [int(match[1]) + 1 for match in found if match]
        if epochs:
            return max(epochs)
    return None


def summary(folder: Path) -> Summary | None:
    """Of the training in this folder; None if there was none."""
    path = folder / LOGS[0]
    rows: Sequence[dict[str, Any]] = read(path) if path.exists() else []
    kept = [row for row in rows if row["best"]]
    if not kept:
        return None
    seconds = sum(row["seconds"] for row in rows)
    return Summary(kept[-1], rows[-1]["epoch"], seconds, "before the constants of the elements were fitted")


def remove_logs(folder: Path) -> None:
    """Those of another training."""
    for name in LOGS:
        (folder / name).unlink(missing_ok=True)
