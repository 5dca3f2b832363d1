"""Figures of one run: one function, one PNG file. No pyplot, so no global state and no display.

Every function takes plain arrays and the path of the file, and returns the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from ubmd.analysis.style import (
    BLUE,
    COLOURS,
    COUNTS,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PINK,
    count_bar,
    legend_above,
    log_ticks,
    new_figure,
    save,
    symbol,
)
from ubmd.measure.errors import ParityData, share_covered
from ubmd.runs.stage_names import stage_name

_HEXBIN_FROM = 600  # more points than this are drawn as counts

ENDINGS = {"step limit": BLUE, "threshold": ORANGE, "desorbed": GREEN, "failed": PINK}
"""How a replica can end, with its colour."""

_STAGE_COLOURS = {
    "test_set": GREY,
    "train": BLUE,
    "export": "#F0E442",
    "measure": "#56B4E9",
    "md": ORANGE,
    "select": PINK,
    "label": GREEN,
    "check_labels": "#000000",
}


def learning_curve_figure(curves: Mapping[str, Sequence[ArrayLike]], path: Path, x_name: str = "Labels") -> Path:
    """Errors against the number of labels (or whatever ``x_name`` says).

    Args:
        curves: name of the set -> (labels [K], energy RMSE [K] meV/atom, force RMSE [K] eV/Å, stress RMSE [K] MPa); a
            stress that is NaN in all sets has no panel.
        path: of the picture.
        x_name: label of the horizontal axes.
    """
    units = ["Energy RMSE (meV/atom)", "Force RMSE (eV/Å)"]
    if any(np.isfinite(np.asarray(values[3], dtype=float)).any() for values in curves.values()):
        units.append("Stress RMSE (MPa)")
    figure = new_figure(8.0, 3.6 if len(units) == 2 else 3.2)
    panels = figure.subplots(1, len(units))
    for k, unit in enumerate(units, 1):
        axes = panels[k - 1]
        for (name, values), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
            shape = f"-{marker}"
            axes.plot(np.asarray(values[0]), np.asarray(values[k]), shape, color=colour, markersize=4, label=name)
        axes.set_yscale("log")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7 if len(units) == 2 else 4))
        axes.grid(alpha=0.25, which="both")
        log_ticks(axes, x=False)
    figure.supxlabel(x_name, fontsize=10)
    legend_above(figure, *panels[0].get_legend_handles_labels(), columns=4)
    return save(figure, path)


def parity_figure(data: ParityData, path: Path) -> Path:
    """Model against reference: energies, force components, stress components, whichever have labels (one at least)."""
    panels = [
        ("Energy", "eV/atom", data.energy_label, data.energy, 1000.0, "meV/atom"),
        ("Force components", "eV/Å", data.force_label, data.force, 1.0, "eV/Å"),
    ]
    if len(data.stress):
        panels.append(("Stress components", "GPa", data.stress_label / 1000, data.stress / 1000, 1000.0, "MPa"))
    panels = [panel for panel in panels if len(panel[2])]
    figure = new_figure(8.0 if len(panels) > 1 else 4.6, 3.0 if len(panels) == 3 else 4.2, square=True)
    row = list(figure.subplots(1, len(panels), squeeze=False)[0])
    clouds = []
    for axes, (title, unit, label, value, factor, error_unit) in zip(row, panels, strict=True):
        low, high = _span(label, value)
        clouds += _cloud(axes, label, value, (low, high, low, high), log=False)
        axes.plot([low, high], [low, high], color="black", linewidth=1)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        rmse, mae = np.sqrt(np.mean((value - label) ** 2)), np.mean(np.abs(value - label))
        # In the title: inside the axes it would hide points.
        errors = [
            f"{name} {_three_digits(float(factor * x))} {error_unit}" for name, x in (("RMSE", rmse), ("MAE", mae))
        ]
        axes.set_title("\n".join([title, *errors]), fontsize=9.5)
        axes.set_xlabel(f"Reference ({unit})")
        axes.set_ylabel(f"Model ({unit})", labelpad=2.0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=3 if len(panels) == 3 else 5))
        axes.grid(alpha=0.25)
    count_bar(figure, clouds, *row)
    return save(figure, path)


def _three_digits(value: float) -> str:
    """0.0267, 93.9, 1,120: without powers of ten for large values."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def calibration_figure(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike]], path: Path, names: Sequence[tuple[str, str]]
) -> Path:
    """Uncertainty against error, one panel each, with the share under the diagonal, where the error is the smaller one.

    Args:
        panels: title -> (calibrated uncertainty [N], error [N]), both in the same unit.
        path: of the picture.
        names: (horizontal, vertical) axis label of each panel.
    """
    figure = new_figure(4.0 * len(panels), 4.1, square=True)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, pair), name in zip(row, panels.items(), names, strict=True):
        count_bar(figure, draw_calibration(axes, title, *pair), axes)
        axes.set_xlabel(name[0])
        axes.set_ylabel(name[1])
    return save(figure, path)


def draw_calibration(
    axes: Axes,
    title: str,
    uncertainty: ArrayLike,
    error: ArrayLike,
    limits: tuple[float, float] | None = None,
    ticks: int = 7,
) -> list[PolyCollection]:
    """One panel of `calibration_figure`; ``limits`` and number of ``ticks`` of both axes. Returns any hexagons."""
    u, e = np.asarray(uncertainty, dtype=float), np.asarray(error, dtype=float)
    positive = np.concatenate([u[u > 0], e[e > 0]])
    low, high = limits or ((0.8 * positive.min(), 1.25 * positive.max()) if len(positive) else (0.1, 1.0))
    # A few tiny errors would stretch the axes: they are drawn at the edge.
    low = max(low, high / 1e4)
    drawn = _cloud(axes, np.clip(u, low, None), np.clip(e, low, None), (low, high, low, high), log=True)
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    axes.fill_between([low, high], [low, low], [low, high], color=GREEN, alpha=0.08, linewidth=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    log_ticks(axes, at_most=ticks)
    # In the title: inside the axes it would hide points.
    axes.set_title(f"{title}\n{100.0 * share_covered(e, u):.0f} % under the diagonal", fontsize=10)
    return drawn


def max_u_figure(max_u: ArrayLike, path: Path) -> Path:
    """Largest atomic uncertainty of frames, in their order and as a distribution.

    Args:
        max_u: [S] max_i u_i, eV/Å.
        path: of the picture.
    """
    u = np.asarray(max_u, dtype=float)
    figure = new_figure(8.0, 3.6)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    size = 4.0 if len(u) <= _HEXBIN_FROM else 2.0
    left.plot(np.arange(len(u)), u, "o", color=BLUE, markersize=size, alpha=0.7, markeredgewidth=0)
    right.hist(u, bins=min(40, max(5, len(u) // 5)), orientation="horizontal", color=BLUE)
    left.set(xlabel="Frame", ylabel="max $u_i$ (eV/Å)", ylim=(0.0, None))
    left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    right.set_xlabel("Frames")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return save(figure, path)


def ramachandran_figure(
    angles: ArrayLike, iteration: ArrayLike, path: Path, names: Sequence[str] = ("phi", "psi"), title: str = ""
) -> Path:
    """Visited torsion pairs, coloured by the iteration that visited them.

    Args:
        angles: [N, 2], rad. iteration: [N].
        path: of the picture.
        names: of the two torsions.
        title: of the picture.
    """
    degrees = np.degrees(np.asarray(angles, dtype=float))
    figure = new_figure(5.8, 4.8, square=True)
    axes = figure.subplots()
    map_, norm = _iteration_colours(figure, axes, iteration)
    axes.scatter(degrees[:, 0], degrees[:, 1], c=np.asarray(iteration), cmap=map_, norm=norm, s=9, linewidths=0)
    corners = np.arange(-180, 181, 60)
    axes.set(xlim=(-180, 180), ylim=(-180, 180), xticks=corners, yticks=corners, aspect="equal")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"{symbol(names[0])} (degrees)")
    axes.set_ylabel(f"{symbol(names[1])} (degrees)")
    axes.grid(alpha=0.25)
    return save(figure, path)


def volume_figure(md_steps: ArrayLike, volume: ArrayLike, iteration: ArrayLike, path: Path) -> Path:
    """Cell volumes that the replicas reached, in the order of the MD, and how often each was seen.

    Args:
        md_steps: [N] MD steps of all replicas up to the frame. volume: [N] Å³ per atom. iteration: [N].
        path: of the picture.
    """
    figure = new_figure(8.0, 3.6)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    map_, norm = _iteration_colours(figure, right, iteration)
    steps = np.asarray(md_steps, dtype=float) / 1000.0
    left.scatter(steps, np.asarray(volume), c=np.asarray(iteration), cmap=map_, norm=norm, s=9, linewidths=0)
    right.hist(np.asarray(volume), bins=40, orientation="horizontal", color=BLUE)
    left.set_xlabel("MD steps of all replicas (thousands)")
    left.set_ylabel("Volume (Å³/atom)")
    right.set_xlabel("Frames")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    return save(figure, path)


def coverage_figure(
    curves: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]],
    path: Path,
    title: str = "",
    what: str = "Coverage of torsion space",
) -> Path:
    """Coverage against MD steps.

    Args:
        curves: name -> curves (MD steps [M], coverage [M]) of one or more runs. Several runs of one name are drawn
            thin, with their mean ± standard deviation over the steps that all of them reached.
        path: of the picture.
        title: of the picture.
        what: label of the vertical axis.
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    draw_growth(axes, curves)
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(what)
    axes.set_xlabel("MD steps of all replicas (thousands)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower right")
    return save(figure, path)


def exploration_figure(
    by_time: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]],
    by_labels: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]],
    path: Path,
    what: str,
) -> Path:
    """A growing quantity of groups of runs against simulated time and against labels.

    Args:
        by_time: name -> curves (ps of all replicas together [M], quantity [M]) of one or more runs.
        by_labels: name -> curves (labels [K], quantity [K]).
        path: of the picture.
        what: label of the vertical axis.
    """
    figure = new_figure(8.0, 3.9)
    left, right = figure.subplots(1, 2, sharey=True)
    draw_growth(left, by_time, 1.0)
    draw_growth(right, by_labels, 1.0)
    left.set_ylabel(what)
    left.set_xlabel("Simulated time of all replicas (ps)")
    right.set_xlabel("Labels")
    right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    handles = left.get_legend_handles_labels()
    if handles[0]:
        legend_above(figure, *handles, columns=3)
    return save(figure, path)


def draw_growth(axes: Axes, curves: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]], unit: float = 1000.0) -> None:
    """Growing quantities of groups of runs; ``unit`` of the horizontal axis (1000: thousands of MD steps)."""
    end = 0.0
    for (name, runs), colour in zip(curves.items(), COLOURS, strict=False):
        pairs = [(np.asarray(x, dtype=float) / unit, np.asarray(y, dtype=float)) for x, y in runs]
        pairs = [pair for pair in pairs if len(pair[0])]
        end = max([end, *(x[-1] for x, _ in pairs)])
        alone = len(pairs) == 1
        for x, y in pairs:
            label = name if alone and len(curves) > 1 else None
            axes.plot(x, y, color=colour, linewidth=1.8 if alone else 0.7, alpha=1.0 if alone else 0.6, label=label)
        if len(pairs) > 1:
            _mean_band(axes, pairs, colour, name)
    axes.set(xlim=(0.0, end or 1.0), ylim=(0.0, None))
    axes.grid(alpha=0.25)


def mean_curve(
    runs: Sequence[tuple[ArrayLike, ArrayLike]], points: int = 200
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(steps, mean, sample standard deviation) of curves at equal steps, up to the shortest curve.

    Coverage starts at 0 before the first step; between points it is interpolated linearly.
    """
    end = min(float(np.asarray(x)[-1]) for x, _ in runs)
    grid = np.linspace(0.0, end, points)
    values = np.array([np.interp(grid, np.append(0.0, x), np.append(0.0, y)) for x, y in runs])
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(points)
    return grid, values.mean(axis=0), deviation


def uncertainty_figure(
    iteration: ArrayLike,
    replica: ArrayLike,
    time: ArrayLike,
    max_u: ArrayLike,
    threshold: float,
    path: Path,
    endings: Mapping[tuple[int, int], str] | None = None,
) -> Path:
    """Largest atomic uncertainty along the replicas of up to six iterations, with the threshold.

    Args:
        iteration, replica: [N] of each frame. time: [N] ps. max_u: [N] max_i u_i, eV/Å.
        threshold: at which replicas stop, eV/Å.
        path: of the picture.
        endings: (iteration, replica) -> how it ended, a key of `ENDINGS`.
    """
    numbers, owners, times, u = (np.asarray(values) for values in (iteration, replica, time, max_u))
    all_numbers = np.unique(numbers)
    shown = np.unique(all_numbers[np.linspace(0, len(all_numbers) - 1, min(6, len(all_numbers))).round().astype(int)])
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(8.0 if columns > 1 else 5.0, 2.3 * rows + 0.9)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, number in zip(panels.flat, shown, strict=False):
        for owner in np.unique(owners[numbers == number]):
            chosen = (numbers == number) & (owners == owner)
            colour = ENDINGS[(endings or {}).get((int(number), int(owner)), "step limit")]
            axes.plot(times[chosen], u[chosen], "-o", color=colour, alpha=0.55, linewidth=0.9, markersize=2.2)
        if np.isfinite(threshold):
            axes.axhline(threshold, color="black", linewidth=1.0, linestyle="--")
        axes.set_title(f"Iteration {number}", fontsize=10)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(alpha=0.25)
        log_ticks(axes, x=False)
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("Time of the replica (ps)", fontsize=10.5)
    figure.supylabel("max $u_i$ (eV/Å)", fontsize=10.5)
    used = [name for name in ENDINGS if not endings or name in endings.values()]
    lines = [Line2D([], [], color=ENDINGS[name], label=f"ended by: {name}") for name in used if endings]
    if np.isfinite(threshold):
        lines.append(Line2D([], [], color="black", linestyle="--", label=f"threshold {threshold:g} eV/Å"))
    if lines:
        legend_above(figure, lines, [str(line.get_label()) for line in lines], columns=len(lines))
    return save(figure, path)


def replicas_figure(
    iterations: Sequence[int], counts: Mapping[str, ArrayLike], picoseconds: ArrayLike, path: Path
) -> Path:
    """How the replicas of each iteration ended, and how long they ran on average.

    Args:
        iterations: [K] numbers. counts: ending -> replicas [K]. picoseconds: [K] mean time of a replica.
        path: of the picture.
    """
    figure = new_figure(8.0, 3.3)
    left, right = figure.subplots(1, 2)
    _stack(left, iterations, {name: counts[name] for name in ENDINGS if np.any(counts[name])}, ENDINGS)
    left.set_ylabel("Replicas")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.plot(iterations, np.asarray(picoseconds), "-o", color=BLUE, markersize=4)
    right.set(xlabel="Iteration", ylabel="Mean time of a replica (ps)", ylim=(0.0, None), xlim=left.get_xlim())
    right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right.grid(alpha=0.25)
    return save(figure, path)


def convergence_figure(labels: ArrayLike, force_rmse: ArrayLike, factor: ArrayLike, path: Path) -> Path:
    """The quantities of the plateau rule against the number of labels.

    Args:
        labels: [K]. force_rmse: [K] of held-out labels, eV/Å. factor: [K] from raw to calibrated force uncertainties.
        path: of the picture.
    """
    figure = new_figure(8.0, 3.3)
    panels = figure.subplots(1, 2)
    names = ("Force RMSE, held-out labels (eV/Å)", "Calibration factor, raw $u_i$ to eV/Å")
    for axes, values, name, colour in zip(panels, (force_rmse, factor), names, (BLUE, ORANGE), strict=True):
        axes.plot(np.asarray(labels), np.asarray(values), "-o", color=colour, markersize=4)
        axes.set(xlabel="Labels", ylabel=name, ylim=(0.0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.grid(alpha=0.25)
    return save(figure, path)


def time_figure(names: Sequence[str], seconds: Mapping[str, ArrayLike], path: Path) -> Path:
    """Wall time of every iteration, split by stage.

    Args:
        names: [K] of the iterations. seconds: stage -> [K] s.
        path: of the picture.
    """
    largest = max(np.sum([np.asarray(v, dtype=float) for v in seconds.values()], axis=0), default=0.0)
    factor, unit = next(
        (f, u) for f, u, limit in ((1, "s", 180), (60, "min", 10800), (3600, "h", np.inf)) if largest <= limit
    )
    figure = new_figure(8.0, 3.5)
    axes = figure.subplots()
    parts = {stage_name(stage): np.asarray(values) / factor for stage, values in seconds.items()}
    _stack(axes, names, parts, {stage_name(stage): colour for stage, colour in _STAGE_COLOURS.items()})
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    axes.set_ylabel(f"Wall time ({unit})")
    return save(figure, path)


def group_learning_figure(groups: Mapping[str, Sequence[NDArray[np.float64]]], path: Path) -> Path:
    """Errors of groups of runs against labels and against MD steps; bars are standard deviations in a group.

    Args:
        groups: name -> one array [K, 5] per run: labels, MD steps, RMSE of energy (meV/atom), force (eV/Å) and stress
            (MPa; NaN without stress labels: then it has no row).
        path: of the picture.
    """
    units = ["Energy RMSE (meV/atom)", "Force RMSE (eV/Å)"]
    if any(np.isfinite(run[:, 4]).any() for runs in groups.values() for run in runs):
        units.append("Stress RMSE (MPa)")
    figure = new_figure(8.0, 0.8 + 2.8 * len(units))
    panels = figure.subplots(len(units), 2, sharex="col", sharey="row")
    shapes = list(zip(COLOURS, MARKERS, strict=True))
    for k, (name, runs) in enumerate(groups.items()):
        colour, marker = shapes[k % len(shapes)]
        mean, deviation = _at_equal_labels(runs)
        for row, quantity in enumerate(range(2, 2 + len(units))):
            for column, x in enumerate((0, 1)):
                scale = 1000.0 if x == 1 else 1.0
                style = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2.5, "linewidth": 1.5}
                bars = {"yerr": deviation[:, quantity], "xerr": deviation[:, x] / scale} if len(runs) > 1 else {}
                label = f"{name} ({len(runs)} runs)" if len(runs) > 1 else name
                axes = panels[row, column]
                axes.errorbar(mean[:, x] / scale, mean[:, quantity], **bars, **style, elinewidth=0.9, label=label)
    for row, unit in enumerate(units):
        panels[row, 0].set_ylabel(unit)
        panels[row, 0].set_yscale("log")
        log_ticks(panels[row, 0], x=False)
        for axes in panels[row]:
            axes.grid(alpha=0.25, which="both")
    panels[-1, 0].set_xlabel("Labels")
    panels[-1, 1].set_xlabel("MD steps of all replicas (thousands)")
    panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    panels[-1, 1].xaxis.set_major_locator(MaxNLocator(nbins=7))
    legend_above(figure, *panels[0, 0].get_legend_handles_labels(), columns=3)
    return save(figure, path)


def at_labels(run: NDArray[np.float64], labels: ArrayLike) -> NDArray[np.float64]:
    """A learning curve [K, 5] (see `group_learning_figure`) at other numbers of labels [M] within its range.

    Between two models MD steps are interpolated linearly, errors in their logarithm: rejected labels make the numbers
    of several runs differ.
    """
    wanted = np.asarray(labels, dtype=np.float64)
    columns = [np.interp(wanted, run[:, 0], run[:, k]) for k in (0, 1)]
    columns += [np.exp(np.interp(wanted, run[:, 0], np.log(np.maximum(run[:, k], 1e-12)))) for k in (2, 3, 4)]
    return np.stack(columns, axis=1)


def shared_labels(runs: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Numbers of labels at which to compare learning curves: those of the run with the fewest, in the range of all."""
    low, high = max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs)
    fewest = min((run[:, 0] for run in runs), key=len)
    chosen = {x for x in fewest.tolist() if low <= x <= high}
    return np.array(sorted(chosen | ({low, high} if low <= high else set())))


def _at_equal_labels(runs: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sample standard deviation [K, 5] over runs at equal numbers of labels."""
    values = np.array([at_labels(run, shared_labels(runs)) for run in runs])
    deviation = values.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(values.shape[1:])
    return values.mean(axis=0), deviation


def group_calibration_figure(groups: Mapping[str, tuple[ArrayLike, ArrayLike]], path: Path, columns: int = 3) -> Path:
    """Largest uncertainty against largest error of structures, one panel per group, on equal axes and colours.

    Args:
        groups: name -> (max_i u_i [S], max_i RMSE(F_i) [S]), eV/Å.
        path: of the picture.
        columns: at most.
    """
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    figure = new_figure(2.35 * columns + 1.0 if columns > 1 else 4.5, 2.75 * rows + 0.5, square=True)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    everything = np.concatenate([np.ravel(values) for pair in groups.values() for values in pair])
    limits = (0.8 * float(everything[everything > 0].min()), 1.25 * float(everything.max()))
    used = list(zip(panels, groups.items(), strict=False))
    clouds = [
        cloud for axes, (name, pair) in used for cloud in draw_calibration(axes, name, *pair, limits=limits, ticks=4)
    ]
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    count_bar(figure, clouds, *panels)
    figure.supxlabel("max $u_i$ (eV/Å)", fontsize=10.5)
    figure.supylabel("max RMSE($F_i$) (eV/Å)", fontsize=10.5)
    return save(figure, path)


def _stack(axes: Axes, names: Sequence[object], parts: Mapping[str, ArrayLike], colours: Mapping[str, str]) -> None:
    """Stacked bars, one per name."""
    positions, bottom = np.arange(len(names)), np.zeros(len(names))
    for key, values in parts.items():
        heights = np.asarray(values, dtype=float)
        axes.bar(positions, heights, 0.8, bottom=bottom, color=colours.get(key, "#000000"), label=key)
        bottom += heights
    every = -(-len(names) // 12)
    axes.set_xticks(positions[::every], [str(name) for name in names][::every])
    axes.set_xlabel("Iteration")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)


def _cloud(
    axes: Axes, x: ArrayLike, y: ArrayLike, extent: tuple[float, float, float, float], *, log: bool
) -> list[PolyCollection]:
    """Few points as dots, many as hexagons coloured by their number: these are returned, for `count_bar`."""
    if log:
        axes.set(xscale="log", yscale="log")
    if np.size(x) <= _HEXBIN_FROM:
        size, alpha = (3.5, 0.45) if np.size(x) > 60 else (5.5, 0.8)
        axes.plot(np.asarray(x), np.asarray(y), "o", color=BLUE, markersize=size, alpha=alpha, markeredgewidth=0)
        return []
    scale: Literal["linear", "log"] = "log" if log else "linear"
    limits = tuple(np.log10(extent)) if log else extent
    return [axes.hexbin(x, y, gridsize=45, xscale=scale, yscale=scale, mincnt=1, extent=limits, cmap=COUNTS)]


def _span(*values: ArrayLike) -> tuple[float, float]:
    """Limits around all values."""
    joined = np.concatenate([np.ravel(np.asarray(v, dtype=float)) for v in values])
    low, high = float(joined.min()), float(joined.max())
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _iteration_colours(figure: Figure, axes: Axes, iteration: ArrayLike) -> tuple[Colormap, BoundaryNorm]:
    """One colour per iteration, and a colour bar beside the axes."""
    numbers = np.asarray(iteration, dtype=int)
    first, last = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    # The light end of the colour map would be invisible on white.
    colours = colormaps["viridis"].resampled(256)(np.linspace(0.0, 0.93, last - first + 1))
    map_ = matplotlib.colors.ListedColormap(colours)
    norm = BoundaryNorm(np.arange(first - 0.5, last + 1.0), map_.N)
    ticks = np.arange(first, last + 1, -(-(last - first + 1) // 10))
    figure.colorbar(ScalarMappable(norm, map_), ax=axes, label="Iteration", ticks=ticks)
    return map_, norm


def _mean_band(axes: Axes, pairs: Sequence[tuple[ArrayLike, ArrayLike]], colour: str, name: str) -> None:
    grid, mean, deviation = mean_curve(pairs)
    axes.plot(grid, mean, color=colour, linewidth=2.2, label=f"{name} (mean ± sd of {len(pairs)})")
    axes.fill_between(grid, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
