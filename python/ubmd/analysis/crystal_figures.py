"""Pictures of force-constant potentials and of dynamic runs: one function, one PNG file, plain arrays in.

Every function takes the path of the picture and returns it, as those of `ubmd.analysis.figures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from ubmd.analysis.style import BLUE, COLOURS, GREY, new_figure, save
from ubmd.crystal.phonons import Dispersion


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
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(bands), frameon=False)
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
