"""Pictures of a run: one function, one PNG file. No pyplot, so no global state and no display.

Every function takes plain arrays and the path of the picture, and returns the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from ubmd.analysis.errors import share_covered

# Okabe and Ito's colours: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9")
_HEXBIN_FROM = 2000  # more points than this are drawn as counts


def learning_curve_figure(
    labels: ArrayLike, energy_rmse: ArrayLike, force_rmse: ArrayLike, path: Path, title: str = "Test set"
) -> Path:
    """Test errors against the number of labels.

    Args:
        labels: [K] size of the data set.
        energy_rmse: [K] meV/atom. force_rmse: [K] eV/Å.
    """
    figure = _figure(8.0, 3.6)
    left, right = figure.subplots(1, 2)
    _curve(left, labels, energy_rmse, BLUE, "Energy RMSE (meV/atom)")
    _curve(right, labels, force_rmse, ORANGE, "Force RMSE (eV/Å)")
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def calibration_figure(largest_u: ArrayLike, largest_error: ArrayLike, path: Path, title: str = "") -> Path:
    """Largest atomic uncertainty against largest atomic force error of S structures; below the diagonal is safe.

    Args:
        largest_u: [S] max_i u_i, eV/Å, calibrated. largest_error: [S] max_i RMSE(F_i), eV/Å.
    """
    u, error = np.asarray(largest_u, dtype=float), np.asarray(largest_error, dtype=float)
    figure = _figure(5.4, 4.8, square=True)
    axes = figure.subplots()
    low, high = 0.8 * min(u.min(), error.min()), 1.25 * max(u.max(), error.max())
    if len(u) > _HEXBIN_FROM:
        extent = tuple(np.log10([low, high, low, high]))
        bins = axes.hexbin(u, error, gridsize=45, xscale="log", yscale="log", norm=LogNorm(), mincnt=1, extent=extent)
        figure.colorbar(bins, ax=axes, label="Structures")
    else:
        axes.loglog(u, error, "o", color=BLUE, markersize=4, alpha=0.45, markeredgewidth=0)
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    axes.fill_between([low, high], [low, low], [low, high], color=GREEN, alpha=0.08, linewidth=0)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_title(title, fontsize=11)
    _log_ticks(axes)
    axes.set_xlabel("Largest atomic uncertainty, max $u_i$ (eV/Å)")
    axes.set_ylabel("Largest atomic force error, max RMSE($F_i$) (eV/Å)")
    share = 100.0 * share_covered(error, u)
    axes.text(0.97, 0.04, f"{share:.0f} % under the diagonal", transform=axes.transAxes, ha="right")
    return _save(figure, path)


def ramachandran_figure(
    angles: ArrayLike, iteration: ArrayLike, path: Path, names: Sequence[str] = ("phi", "psi"), title: str = ""
) -> Path:
    """Visited torsion pairs, coloured by the iteration that visited them.

    Args:
        angles: [N, 2], rad. iteration: [N].
    """
    degrees = np.degrees(np.asarray(angles, dtype=float))
    numbers = np.asarray(iteration, dtype=int)
    figure = _figure(5.8, 4.8, square=True)
    axes = figure.subplots()
    first, last = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    # one colour per iteration; the light end of the map would vanish on white
    colours = colormaps["viridis"].resampled(256)(np.linspace(0.0, 0.93, last - first + 1))
    map_ = matplotlib.colors.ListedColormap(colours)
    norm = BoundaryNorm(np.arange(first - 0.5, last + 1.0), map_.N)
    axes.scatter(degrees[:, 0], degrees[:, 1], c=numbers, cmap=map_, norm=norm, s=9, linewidths=0)
    ticks = np.arange(first, last + 1, -(-(last - first + 1) // 10))
    figure.colorbar(ScalarMappable(norm, map_), ax=axes, label="Iteration", ticks=ticks)
    corners = np.arange(-180, 181, 60)
    axes.set(xlim=(-180, 180), ylim=(-180, 180), xticks=corners, yticks=corners, aspect="equal")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(f"{_symbol(names[0])} (degrees)")
    axes.set_ylabel(f"{_symbol(names[1])} (degrees)")
    axes.grid(alpha=0.25)
    return _save(figure, path)


def coverage_figure(curves: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]], path: Path, title: str = "") -> Path:
    """Coverage against MD steps.

    Args:
        curves: name -> curves (MD steps [M], coverage [M]) of one or more runs. Several runs of one name are drawn
            thin, with their mean ± standard deviation over the steps that all of them reached.
    """
    figure = _figure(6.0, 4.0)
    axes = figure.subplots()
    end = 0.0
    for (name, runs), colour in zip(curves.items(), COLOURS, strict=False):
        pairs = [(np.asarray(x, dtype=float) / 1000.0, np.asarray(y, dtype=float)) for x, y in runs]
        end = max([end, *(x[-1] for x, _ in pairs if len(x))])
        alone = len(pairs) == 1
        for x, y in pairs:
            label = name if alone and len(curves) > 1 else None
            axes.plot(x, y, color=colour, linewidth=1.8 if alone else 0.7, alpha=1.0 if alone else 0.6, label=label)
        if not alone:
            _mean_band(axes, pairs, colour, name)
    axes.set(xlim=(0.0, end or 1.0), ylim=(0.0, None))
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("MD steps of all replicas (thousands)")
    axes.set_ylabel("Coverage of torsion space")
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="lower right")
    return _save(figure, path)


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
    iteration: ArrayLike, replica: ArrayLike, step: ArrayLike, max_u: ArrayLike, threshold: float, path: Path
) -> Path:
    """Largest atomic uncertainty along the replicas of up to six iterations, with the threshold.

    Args:
        iteration, replica, step: [N] of each frame. max_u: [N] max_i u_i, eV/Å.
    """
    numbers, owners, steps, u = (np.asarray(values) for values in (iteration, replica, step, max_u))
    all_numbers = np.unique(numbers)
    shown = np.unique(all_numbers[np.linspace(0, len(all_numbers) - 1, min(6, len(all_numbers))).round().astype(int)])
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(2.7 * columns + 0.9, 2.3 * rows + 0.8)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, number in zip(panels.flat, shown, strict=False):
        for owner in np.unique(owners[numbers == number]):
            chosen = (numbers == number) & (owners == owner)
            axes.plot(steps[chosen], u[chosen], "-o", color=BLUE, alpha=0.55, linewidth=0.9, markersize=2.2)
        axes.axhline(threshold, color=ORANGE, linewidth=1.2, linestyle="--")
        axes.set_title(f"Iteration {number}", fontsize=10)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(alpha=0.25)
        _log_ticks(axes, x=False)
    for axes in list(panels.flat)[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("MD step of the replica", fontsize=10.5)
    figure.supylabel("max $u_i$ (eV/Å)", fontsize=10.5)
    figure.suptitle(f"One line per replica; dashed: threshold {threshold:g} eV/Å", fontsize=10.5)
    return _save(figure, path)


def _curve(axes: Axes, x: ArrayLike, y: ArrayLike, colour: str, name: str) -> None:
    axes.plot(np.asarray(x), np.asarray(y), "-o", color=colour, markersize=4)
    axes.set_yscale("log")
    axes.set_xlabel("Labels")
    axes.set_ylabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, which="both")
    _log_ticks(axes, x=False)


def _mean_band(axes: Axes, pairs: Sequence[tuple[ArrayLike, ArrayLike]], colour: str, name: str) -> None:
    grid, mean, deviation = mean_curve(pairs)
    axes.plot(grid, mean, color=colour, linewidth=2.2, label=f"{name} (mean ± sd of {len(pairs)})")
    axes.fill_between(grid, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)


def _log_ticks(axes: Axes, x: bool = True) -> None:
    """Plain numbers (0.05, 2, 100) on logarithmic axes; more of them if the axis spans little."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis is axes.xaxis and not x:
            continue
        decades = np.log10(high / low) if low > 0 else 1.0
        subs = (1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.7 else tuple(np.arange(1.0, 10.0))
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _symbol(name: str) -> str:
    """Greek letter of a torsion's name, if it has one."""
    return rf"$\{name}$" if name in ("phi", "psi", "omega", "chi") else name


def _figure(width: float, height: float, square: bool = False) -> Figure:
    """A figure of this size in inches whose labels are never clipped; ``square``: for axes of equal aspect."""
    figure = Figure(figsize=(width, height), layout="compressed" if square else "constrained", facecolor="white")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.1, h_pad=0.08)  # type: ignore[call-arg]
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, format="png")
    return path
