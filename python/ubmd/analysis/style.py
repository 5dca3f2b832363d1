"""The style of all figures: colours, sizes, axes, file format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ubmd.files import replacing

# Okabe and Ito's colours: distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9", GREY, "#000000")
MARKERS = "osD^vP*X"
COUNTS = ListedColormap(colormaps["viridis_r"](np.linspace(0.08, 1.0, 256)))
"""Colours of numbers per cell; the light end of the colour map would be invisible on white."""
DPI = 160
"""Dots per inch of the files: 8 inches are shown 800 pixels wide, sharp also on high-density screens."""


def new_figure(width: float, height: float, square: bool = False) -> Figure:
    """A figure of this size in inches whose labels are never clipped; ``square``: for axes of equal aspect."""
    figure = Figure(figsize=(width, height), layout="compressed" if square else "constrained", facecolor="white")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.1, h_pad=0.08)  # type: ignore[call-arg]
    return figure


def legend_above(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], *, columns: int = 3) -> None:
    """A legend above all axes, in as many columns (at most ``columns``) as the figure is wide enough for."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for count in range(columns, 0, -1):
        legend = figure.legend(handles, labels, loc="outside upper center", ncols=count, frameon=False)
        if count == 1 or legend.get_window_extent(renderer).width < figure.bbox.width:
            return
        legend.remove()


def count_bar(figure: Figure, drawn: Sequence[Collection], *panels: Axes, label: str = "Count") -> None:
    """One colour bar for the numbers drawn in all these panels, on one logarithmic scale; none for nothing."""
    if not drawn:
        return
    norm = LogNorm(1.0, max(2.0, *(float(np.ma.max(np.ma.asarray(part.get_array()))) for part in drawn)))
    for part in drawn:
        part.set_norm(norm)
    bar = figure.colorbar(drawn[0], ax=panels, label=label, shrink=0.85)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG file; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"text.usetex": False}), replacing(path) as file:
        figure.savefig(file, dpi=DPI, format="png")
    return path


def log_ticks(axes: Axes, x: bool = True, y: bool = True, at_most: int = 7) -> None:
    """Plain numbers (0.05, 2, 100) on logarithmic axes: the densest of 1 to 9, 1-2-5, 1-3 and decades of which some
    ``at_most`` fit between the limits."""
    for axis, (low, high), wanted in ((axes.xaxis, axes.get_xlim(), x), (axes.yaxis, axes.get_ylim(), y)):
        if not wanted:
            continue
        decades = np.log10(high / low) if low > 0 else 1.0
        choices = (tuple(np.arange(1.0, 10.0)), (1.0, 2.0, 5.0), (1.0, 3.0))
        subs = next((subs for subs in choices if decades * len(subs) <= at_most), (1.0,))
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def symbol(name: str) -> str:
    """Greek letter of a torsion's name, if it has one."""
    return rf"$\{name}$" if name in ("phi", "psi", "omega", "chi", "theta") else name
