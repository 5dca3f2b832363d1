"""The per-epoch log (CSV) and its picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubmd.files import replacing

Row = dict[str, Any]

COLUMNS = (
    "epoch",
    "seconds",
    "loss",
    *(
        f"{part}_{name}"
        for part in ("train", "valid")
        for name in ("energy_rmse_meV_per_atom", "force_rmse_eV_per_A", "stress_rmse_MPa")
    ),
    "valid_energy_mae_meV_per_atom",
    "valid_force_mae_eV_per_A",
    "best",
)
_PANELS = (
    ("energy_rmse_meV_per_atom", "energy RMSE (meV/atom)"),
    ("force_rmse_eV_per_A", "force RMSE (eV/Å)"),
    ("stress_rmse_MPa", "stress RMSE (MPa)"),
)


class Log:
    """The file ``log.csv``: one row per epoch, on disk as soon as the epoch is over."""

    def __init__(self, path: Path, history: Sequence[Row] = ()) -> None:
        """Start the file with the rows of ``history`` only: rows after a checkpoint are computed again."""
        path.unlink(missing_ok=True)  # another process that still has the old file open must not write into this one
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="", extrasaction="ignore")
        self._writer.writeheader()
        for row in history:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append one epoch; missing values become empty cells."""
        self._writer.writerow({key: _text(value) for key, value in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def draw(history: Sequence[Row], path: Path) -> None:
    """Learning curves: RMSE of energy, forces and (if there is one) stress against the epoch, log axes, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [panel for panel in _PANELS if any(row.get(f"valid_{panel[0]}") is not None for row in history)]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for part, style in (("train", "C0-"), ("valid", "C1.-")):
            points = [(row["epoch"], row[f"{part}_{key}"]) for row in history if row.get(f"{part}_{key}")]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=part, linewidth=1, markersize=2)
        for row in [row for row in history if row.get("best")][-1:]:
            axis.axvline(row["epoch"], color="gray", linestyle=":", label="kept")
        axis.set(xlabel="epoch", ylabel=label, xscale="log", yscale="log")
        axis.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
