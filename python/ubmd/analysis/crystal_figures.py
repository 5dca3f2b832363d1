"""Figures of force-constant potentials and of dynamic runs: one function, one PNG file, plain arrays in.

Every function takes the path of the file and returns it, as those of `ubmd.analysis.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from ubmd.analysis.style import BLUE, COLOURS, GREEN, GREY, MARKERS, ORANGE, legend_above, log_ticks, new_figure, save
from ubmd.potentials.force_constants.phonons import Dispersion
from ubmd.texts import order_name


def phonon_figure(
    bands: Mapping[str, Dispersion], density: tuple[ArrayLike, ArrayLike], path: Path, title: str = ""
) -> Path:
    """Phonon dispersion of one or more potentials, and the density of states of the last one.

    Args:
        bands: name -> branches along one path; the name is shown if there are several.
        density: frequency [N] THz, states per THz and primitive cell [N].
        path: of the picture.
        title: of the picture.
    """
    figure = new_figure(8.0, 4.2)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3.6, 1))
    colours = [BLUE] if len(bands) == 1 else [*reversed(COLOURS[: len(bands)])]
    for (name, one), colour in zip(bands.items(), colours, strict=True):
        _branches(left, one, colour, name if len(bands) > 1 else None)
    last = list(bands.values())[-1]
    left.set(xlim=(0.0, float(last.distance[-1])), ylabel="Frequency (THz)")
    places, labels = _special_points(last)
    left.set_xticks(places, labels)
    for place in places:
        left.axvline(place, color=GREY, linewidth=0.6)
    lowest = min(float(one.frequencies.min()) for one in bands.values())
    unstable = lowest < -0.05
    if not unstable:
        left.set_ylim(0.0, None)
    frequency, states = (np.asarray(values) for values in density)
    right.plot(states, frequency, color=colours[-1], linewidth=1.2)
    right.fill_betweenx(frequency, 0.0, states, color=colours[-1], alpha=0.15, linewidth=0)
    right.set(xlim=(0.0, None), xlabel="States (1/THz per cell)")
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="y")
        if unstable:
            axes.axhline(0.0, color="black", linewidth=0.8)
    if unstable:
        left.set_ylabel("Frequency (THz); below 0: imaginary")
    if len(bands) > 1:
        legend_above(figure, *left.get_legend_handles_labels(), columns=len(bands))
    if title:
        left.set_title(title, fontsize=10.5)
    return save(figure, path)


def _branches(axes: Axes, bands: Dispersion, colour: str, name: str | None) -> None:
    """All branches; the path is cut where it jumps."""
    jumps = np.flatnonzero(np.diff(bands.distance) == 0.0) + 1
    for piece in np.split(np.arange(len(bands.distance)), jumps):
        axes.plot(bands.distance[piece], bands.frequencies[piece], color=colour, linewidth=1.3)
    if name is not None:
        axes.plot([], [], color=colour, label=name)


def _special_points(bands: Dispersion) -> tuple[list[float], list[str]]:
    """Places and names of the special points; two names where the path jumps."""
    places: list[float] = []
    labels: list[str] = []
    for place, label in zip(bands.places, bands.labels, strict=True):
        text = "Γ" if label == "G" else label
        if places and abs(place - places[-1]) < 1e-9:
            labels[-1] += f"|{text}"
        else:
            places.append(float(place))
            labels.append(text)
    return places, labels


def state_equation_figure(
    energies: tuple[ArrayLike, ArrayLike], fit: tuple[ArrayLike, ArrayLike], atomic_u: ArrayLike | None, path: Path
) -> Path:
    """Energy against volume with a fitted equation of state; below, how uncertain the potential is.

    Args:
        energies: volume [K] Å^3/atom, energy above the minimum [K] eV/atom.
        fit: the same of the fitted curve [M].
        atomic_u: largest uncertainty of a force at each volume [K], eV/Å; None: without the lower panel.
        path: of the picture.
    """
    figure = new_figure(5.6, 4.2 if atomic_u is None else 5.4)
    if atomic_u is None:
        grid = [figure.subplots()]
    else:
        grid = list(figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1)))
        grid[1].plot(np.asarray(energies[0]), np.asarray(atomic_u), "-s", color=ORANGE, markersize=4)
        grid[1].set_ylim(0.0, None)
        grid[1].set_ylabel("Largest uncertainty\nof a force (eV/Å)")
    upper = grid[0]
    upper.plot(np.asarray(fit[0]), 1000.0 * np.asarray(fit[1]), color=BLUE, linewidth=1.3, label="Birch-Murnaghan")
    volumes, above = (np.asarray(values) for values in energies)
    upper.plot(volumes, 1000.0 * above, "o", color="black", markersize=5, label="model")
    upper.set_ylabel("Energy above the minimum (meV/atom)")
    grid[-1].set_xlabel("Volume (Å³/atom)")
    for axes in grid:
        axes.grid(alpha=0.25)
    legend_above(figure, *upper.get_legend_handles_labels(), columns=2)
    return save(figure, path)


# ------------------------------------------------------------------------------------------ dynamic runs


def dynamic_learning_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], path: Path, noise: float | None = None, rms: float | None = None
) -> Path:
    """Force errors against the number of reference calculations.

    Args:
        curves: name of the set -> (calls [K], force RMSE [K] eV/Å).
        path: of the picture.
        noise: of the labels as estimated by the newest model, eV/Å: a line.
        rms: root mean square force of the test set, eV/Å: a second axis in % of it.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for (name, (calls, error)), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axes.plot(np.asarray(calls), np.asarray(error), f"-{marker}", color=colour, markersize=4, label=name)
    if noise:
        axes.axhline(noise, color=GREY, linewidth=1.0, linestyle="--", label=r"noise $1/\sqrt{\beta}$ (newest model)")
    axes.set(yscale="log", xlabel="Reference calculations", ylabel="Force RMSE (eV/Å)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    log_ticks(axes, x=False)
    axes.grid(alpha=0.25, which="both")
    if rms:
        scale = 100.0 / rms
        both = (lambda error: np.asarray(error) * scale, lambda share: np.asarray(share) / scale)
        right = axes.secondary_yaxis("right", functions=both)
        right.set_ylabel("% of the rms force of the test set")
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        right.yaxis.set_minor_formatter(NullFormatter())
    legend_above(figure, *axes.get_legend_handles_labels(), columns=3)
    return save(figure, path)


def trajectory_figure(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike]], path: Path
) -> Path:
    """Errors, thresholds and requests for reference calculations along trajectories.

    Args:
        panels: title -> (time [N] ps, error [N], threshold [N], mean [N] (NaN: none), times of the requests [C] ps);
            errors in eV/Å.
        path: of the picture.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(8.0, 2.5 * rows + 0.8 if columns > 1 else 3.8)
    grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (title, (time, error, threshold, mean, calls)) in zip(grid, panels.items(), strict=False):
        t, e = np.asarray(time, dtype=float), np.asarray(error, dtype=float)
        axes.plot(t, e, color=BLUE, linewidth=0.9, label="error")
        axes.plot(t, np.asarray(mean), color=GREEN, linewidth=1.2, label="average since the last refit")
        axes.plot(t, np.asarray(threshold), color=ORANGE, linewidth=1.0, linestyle="--", label="threshold")
        asked = np.asarray(calls, dtype=float)
        if len(asked) and len(t):
            height = e[np.searchsorted(t, asked).clip(max=len(t) - 1)]
            axes.plot(asked, height, "v", color="black", markersize=6, label="reference calculation requested")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    early = _is_early(panels)
    for axes in grid[: len(panels)]:
        if early:
            axes.set_xscale("log")
        else:
            axes.set_xlim(0.0, None)
        log_ticks(axes, x=early)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("Time of the trajectory (ps)", fontsize=10)
    figure.supylabel("Largest force uncertainty (eV/Å)", fontsize=10)
    legend_above(figure, *grid[0].get_legend_handles_labels(), columns=4)
    return save(figure, path)


def _is_early(panels: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike]]) -> bool:
    """Whether most requests are so early that they would overlap on a linear axis of time."""
    shares = [
        np.asarray(calls, dtype=float) / float(np.max(time)) for time, *_, calls in panels.values() if np.size(time)
    ]
    joined = np.concatenate([np.ravel(share) for share in shares] or [np.zeros(0)])
    return len(joined) > 2 and float(np.median(joined)) < 0.08


def signals_figure(
    labels: ArrayLike,
    signals: Mapping[str, tuple[ArrayLike, ArrayLike]],
    error: tuple[ArrayLike, ArrayLike, str] | None,
    path: Path,
) -> Path:
    """Signals of convergence and the true error, against the number of labels.

    Args:
        labels: [K] of each model that signals were computed for.
        signals: label of the axis -> (value [K], threshold [K]).
        error: (labels [M], force RMSE [M] eV/Å, name of the set); None without.
        path: of the picture.
    """
    count = len(signals) + (error is not None)
    figure = new_figure(8.0, 5.6 if count > 2 else 3.2)
    grid = list(figure.subplots(-(-count // 2), 2, sharex=True, squeeze=False).flat)
    if error is not None:
        axes = grid[0]
        axes.plot(np.asarray(error[0]), np.asarray(error[1]), "-s", color="black", markersize=4)
        axes.set_yscale("log")
        axes.set_ylabel(f"True force RMSE,\n{error[2]} (eV/Å)")
        log_ticks(axes, x=False)
    x = np.asarray(labels)
    for axes, (name, (value, threshold)), colour in zip(
        grid[count - len(signals) :], signals.items(), COLOURS, strict=False
    ):
        axes.plot(x, np.asarray(value), "-o", color=colour, markersize=4)
        axes.plot(x, np.asarray(threshold), "--", color=GREY, linewidth=1.0)
        axes.set_ylabel(name)
        axes.set_ylim(0.0, None)
    for axes in grid[:count]:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.grid(alpha=0.25)
    for axes in grid[count:]:
        axes.set_axis_off()
    figure.supxlabel("Labels", fontsize=10)
    return save(figure, path)


def order_shares_figure(shares: Mapping[str, Mapping[int, float]], path: Path) -> Path:
    """Rms force of each order over the rms of the whole force; one group of bars per name.

    Args:
        shares: name -> order -> share (no unit).
        path: of the picture.
    """
    orders = sorted({order for values in shares.values() for order in values})
    figure = new_figure(max(4.6, 1.1 * len(orders) + 1.6), 3.6)
    axes = figure.subplots()
    width = 0.8 / len(shares)
    lowest = min(v for values in shares.values() for v in values.values() if v > 0)
    bottom = 10 ** np.floor(np.log10(lowest))
    for k, ((name, values), colour) in enumerate(zip(shares.items(), COLOURS, strict=False)):
        places = np.arange(len(orders)) + (k - 0.5 * (len(shares) - 1)) * width
        heights = np.array([values.get(order, np.nan) for order in orders])
        axes.bar(places, heights, 0.9 * width, bottom=0, color=colour, label=name or None)
        for place, height in zip(places, heights, strict=True):
            if np.isfinite(height) and len(shares) == 1:
                axes.text(place, 1.08 * height, f"{height:.3g}", ha="center", fontsize=9)
    axes.set(yscale="log", ylim=(bottom, 3.0), xlabel="Order", ylabel="Rms force of the order / rms force")
    axes.set_xticks(np.arange(len(orders)), [order_name(order) for order in orders])
    log_ticks(axes, x=False)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    if len(shares) > 1:
        legend_above(figure, *axes.get_legend_handles_labels(), columns=3)
    return save(figure, path)
