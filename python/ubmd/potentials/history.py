"""The per-epoch log (CSV) and its picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubmd.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

SECONDS_BETWEEN_PICTURES = 30.0  # one takes half a second, as long as many an epoch of a small data set

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
    ("energy_rmse_meV_per_atom", "Energy RMSE (meV/atom)"),
    ("force_rmse_eV_per_A", "Force RMSE (eV/Å)"),
    ("stress_rmse_MPa", "Stress RMSE (MPa)"),
)
# Light and thin on top of dark and thick: told apart in print without colours, and with every kind of colour vision.
_STYLES: dict[str, dict[str, Any]] = {
    "train": {"label": "training", "color": "#56B4E9", "linewidth": 1.0, "zorder": 2.5},
    "valid": {"label": "validation", "color": "#B34700", "linewidth": 1.8},
}
_MARKERS = {"train": "o", "valid": "s"}
_FEW = 40  # points that are marked one by one


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


def read(path: Path) -> list[Row]:
    """The rows of a log; empty cells are left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key: float(text) for key, text in row.items() if text} for row in csv.DictReader(file)]
    return [row | {"epoch": int(row["epoch"]), "best": int(row["best"])} for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def draw(history: Sequence[Row], path: Path) -> None:
    """Learning curves as PNG: RMSE of energy, forces and (if there is one) stress against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [panel for panel in _PANELS if any(row.get(f"valid_{panel[0]}") is not None for row in history)]
    if not panels:
        return
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(1.0 + 3.4 * len(panels), 3.6), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (key, label) in zip(axes, panels, strict=True):
        _draw_panel(axis, history, key)
        axis.set(xlabel="Epoch", ylabel=label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=160)


def _draw_panel(axis: Axes, history: Sequence[Row], key: str) -> None:
    """Training and validation RMSE of one quantity, and the epoch whose weights are kept."""
    from matplotlib.ticker import MaxNLocator

    values: list[float] = []
    for part, style in _STYLES.items():
        points = [(row["epoch"], row[f"{part}_{key}"]) for row in history if row.get(f"{part}_{key}")]
        if points:
            marker = _MARKERS[part] if len(points) <= _FEW else ""
            axis.plot(*zip(*points, strict=True), marker=marker, markersize=4, **style)
            values += [value for _, value in points]
    for row in [row for row in history if row.get("best")][-1:]:
        axis.axvline(row["epoch"], color="black", linestyle="--", linewidth=1.0, label=f"kept: epoch {row['epoch']}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axis.grid(alpha=0.3)
    if values and max(values) > 10.0 * min(values):
        _plain_log_axis(axis)
    else:
        axis.set_ylim(0.0, 1.08 * max(values, default=1.0))


def _plain_log_axis(axis: Axes) -> None:
    """A logarithmic vertical axis with plain numbers (0.05, 0.1, 0.2), fewer of them the more decades there are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = math.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades <= 2.5 else (1.0, 3.0) if decades <= 4.0 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=15))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
