"""Figures of trajectories: visited torsions, autocorrelation functions, cell volumes. One function, one PNG file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ubmd.analysis.style import BLUE, COLOURS, COUNTS, GREY, ORANGE, count_bar, legend_above, new_figure, save, symbol
from ubmd.measure.volumes import SlowWave, VolumeBin

_CELLS = 32  # per torsion: the finest level of the coverage tree


def torsion_histogram_figure(
    groups: Mapping[str, ArrayLike], path: Path, names: Sequence[str] = ("phi", "psi")
) -> Path:
    """How often each cell of 11.25° x 11.25° was visited, one panel per group.

    Args:
        groups: title -> angles [N, 2], rad.
        path: of the picture.
        names: of the two torsions.
    """
    edges = np.linspace(-180.0, 180.0, _CELLS + 1)
    counts = {
        name: np.histogramdd(np.degrees(np.asarray(angles, dtype=float)), bins=[edges, edges])[0]
        for name, angles in groups.items()
    }
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = 2.5 * columns + 0.5 if columns > 1 else 4.6, (2.6 if columns > 1 else 3.6) * rows + 0.3
    figure = new_figure(*size, square=True)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    drawn = []
    for axes, (name, count) in zip(panels, counts.items(), strict=False):
        seen = np.ma.masked_equal(count.T, 0.0)
        drawn.append(axes.pcolormesh(edges, edges, seen, cmap=COUNTS))
        corners = np.arange(-180, 181, 90)
        axes.set(xlim=(-180, 180), ylim=(-180, 180), xticks=corners, yticks=corners, aspect="equal")
        axes.set_title(f"{name}\n{len(np.asarray(groups[name])):,} frames", fontsize=10)
        axes.grid(alpha=0.25)
    _hide_empty(panels, len(groups), columns)
    count_bar(figure, drawn, *panels, label="Frames per cell")
    figure.supxlabel(f"{symbol(names[0])} (degrees)", fontsize=10.5)
    figure.supylabel(f"{symbol(names[1])} (degrees)", fontsize=10.5)
    return save(figure, path)


def histogram_figure(groups: Mapping[str, ArrayLike], path: Path, name: str) -> Path:
    """Normalised histograms of one quantity [N] per group; ``name``: of the quantity, with its unit."""
    values = {group: np.asarray(x, dtype=float) for group, x in groups.items()}
    low, high = (f(f(x) for x in values.values()) for f in (min, max))
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    figure = new_figure(6.0, 3.8)
    axes = figure.subplots()
    for (group, x), colour in zip(values.items(), COLOURS, strict=False):
        axes.hist(x, bins=edges.tolist(), density=True, histtype="step", linewidth=1.7, color=colour, label=group)
    axes.set_xlabel(name)
    axes.set_ylabel("Density")
    axes.grid(alpha=0.25)
    if len(values) > 1:
        axes.legend(frameon=False)
    return save(figure, path)


def autocorrelation_figure(
    groups: Mapping[str, Mapping[str, ArrayLike]],
    spacing: float,
    path: Path,
    times: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Autocorrelation functions against the lag, one panel per quantity.

    Args:
        groups: quantity -> group -> C(t) [K] at the lags 0, spacing, 2 spacing ...
        spacing: ps.
        path: of the picture.
        times: quantity -> group -> autocorrelation time, ps, for the legend.
    """
    figure = new_figure(4.0 * len(groups) if len(groups) > 1 else 5.5, 3.8)
    row = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (quantity, curves) in zip(row, groups.items(), strict=True):
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            c = np.asarray(curve, dtype=float)
            time = (times or {}).get(quantity, {}).get(name)
            known = [] if time is None else [f"time {time:.3g} ps"]
            label = ", ".join([name, *known] if name else known)
            axes.plot(spacing * np.arange(len(c)), c, color=colour, linewidth=1.5, label=label)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_title(quantity, fontsize=10.5)
        axes.set_xlabel("Lag (ps)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
    row[0].set_ylabel("Autocorrelation C(t)")
    return save(figure, path)


def slow_wave_figure(runs: Mapping[str, tuple[ArrayLike, ArrayLike, SlowWave]], path: Path, unit: str = "Å³") -> Path:
    """V(t) of runs, the slow wave fitted to it, and one series of that model, noise included, for comparison.

    Args:
        runs: title -> (times [N] ps, volumes [N], fit).
        path: of the picture.
        unit: of the volumes.
    """
    figure = new_figure(8.0, 2.5 * len(runs) + 0.6)
    panels = figure.subplots(len(runs), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (title, (times, volumes, fit)) in zip(panels, runs.items(), strict=True):
        t = np.asarray(times, dtype=float)
        axes.plot(t, fit.sample(0), color=GREY, linewidth=0.6, alpha=0.5, label="wave + noise (sample)")
        axes.plot(t, np.asarray(volumes), color=BLUE, linewidth=0.9, label="V(t)")
        axes.plot(t, fit.curve, color=ORANGE, linewidth=2.0, label="wave (period: twice the length)")
        axes.set_title(
            f"{title}: amplitude {fit.amplitude:.3g} {unit}, noise {fit.noise:.3g} {unit}, "
            f"explained {100 * fit.explained:.0f} %",
            fontsize=10,
        )
        axes.set_ylabel(f"Volume ({unit})")
        axes.grid(alpha=0.25)
    panels[-1].set_xlabel("Time (ps)")
    legend_above(figure, *panels[0].get_legend_handles_labels(), columns=3)
    return save(figure, path)


def volume_error_figure(groups: Mapping[str, Sequence[Sequence[VolumeBin]]], path: Path) -> Path:
    """RMSE in bins of the volume, mean ± standard deviation over the runs of each group.

    Args:
        groups: name -> bins of one or more runs, with equal edges.
        path: of the picture.
    """
    units = {"energy_rmse_mev_per_atom": "Energy RMSE (meV/atom)", "force_rmse": "Force RMSE (eV/Å)"}
    if any("stress_rmse_mpa" in cell.errors for runs in groups.values() for run in runs for cell in run):
        units["stress_rmse_mpa"] = "Stress RMSE (MPa)"
    figure = new_figure(8.0, 3.4)
    panels = figure.subplots(1, len(units))
    for axes, (key, unit) in zip(panels, units.items(), strict=True):
        for (name, runs), colour in zip(groups.items(), COLOURS, strict=False):
            _draw_bins(axes, runs, key, name, colour)
        axes.set_title(unit, fontsize=10)
        axes.set_ylim(0.0, None)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(alpha=0.25)
    figure.supxlabel("Volume (Å³)", fontsize=10)
    if len(groups) > 1:
        legend_above(figure, *panels[0].get_legend_handles_labels(), columns=3)
    return save(figure, path)


def _draw_bins(axes: Axes, runs: Sequence[Sequence[VolumeBin]], key: str, name: str, colour: str) -> None:
    filled = [k for k, cell in enumerate(runs[0]) if all(run[k].structures for run in runs)]
    values = np.array([[run[k].errors.get(key, np.nan) for k in filled] for run in runs])
    centres = [0.5 * (runs[0][k].low + runs[0][k].high) for k in filled]
    bars = values.std(axis=0, ddof=1) if len(runs) > 1 else None
    axes.errorbar(
        centres, values.mean(axis=0), yerr=bars, color=colour, marker="o", markersize=4, capsize=2.5, label=name
    )


def dependence_figure(x: Sequence[float], rows: Mapping[str, Sequence[Sequence[float]]], name: str, path: Path) -> Path:
    """Quantities of groups of runs against a setting in which the groups differ.

    Args:
        x: value of the setting [G]. rows: quantity -> per group the values of its runs (NaN: unknown).
        name: of the setting.
        path: of the picture.
    """
    order = np.argsort(x)
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(8.0 if columns > 1 else 4.5, 2.4 * lines + 0.6)
    panels = list(figure.subplots(lines, columns, sharex=True, squeeze=False).flat)
    for axes, (title, groups) in zip(panels, rows.items(), strict=False):
        known = [np.array([v for v in groups[k] if np.isfinite(v)]) for k in order]
        places = np.array([x[k] for k in order], dtype=float)
        mean = np.array([v.mean() if len(v) else np.nan for v in known])
        bars = np.array([v.std(ddof=1) if len(v) > 1 else 0.0 for v in known])
        axes.errorbar(places, mean, yerr=bars, color=BLUE, marker="o", markersize=4, capsize=2.5)
        for place, values in zip(places, known, strict=True):
            axes.plot(np.full(len(values), place), values, ".", color=GREY, markersize=4)
        axes.set_title(textwrap.fill(title, 30), fontsize=8.5)
        highest = max((v.max() for v in [*known, mean + bars] if len(v)), default=1.0)
        axes.set_ylim(0.0, 1.08 * float(highest))
        axes.grid(alpha=0.25)
    _hide_empty(panels, len(rows), columns)
    figure.supxlabel(name, fontsize=10)
    return save(figure, path)


def _hide_empty(panels: Sequence[Axes], used: int, columns: int) -> None:
    """Hide axes of empty panels; the panels above them show the numbers of the common horizontal axis."""
    for k in range(used, len(panels)):
        panels[k].set_axis_off()
        panels[k - columns].tick_params(labelbottom=True)
