"""Pictures of structures, coloured by a value of each atom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.visualize.plot import Matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Circle
from numpy.typing import ArrayLike, NDArray

from ubmd.analysis.style import new_figure, save

_COLOURS = colormaps["YlOrRd"]
_MOST_SYMBOLS = 40  # atoms of which each is lettered


def structures_figure(structures: Mapping[str, tuple[Atoms, ArrayLike]], path: Path, name: str) -> Path:
    """Up to six structures side by side, their atoms coloured on one scale from 0.

    Args:
        structures: title -> (structure of N atoms, value of each atom [N]).
        path: of the picture.
        name: of the values, with their unit.
    """
    columns = min(3, len(structures))
    rows = -(-len(structures) // columns)
    figure = new_figure(8.0 if columns > 1 else 4.5, 2.8 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False)
    largest = max(float(np.max(values)) for _, values in structures.values())
    norm = Normalize(0.0, largest or 1.0)
    for axes, (title, (atoms, values)) in zip(panels.flat, structures.items(), strict=False):
        _draw(axes, atoms, _COLOURS(norm(np.asarray(values, dtype=float))))
        axes.set_title(title, fontsize=8.5)
        axes.set_anchor("N")  # titles of a row at one height
    for axes in panels.flat:
        axes.set_axis_off()
    figure.colorbar(ScalarMappable(norm, _COLOURS), ax=panels, label=name, shrink=0.85, panchor=False)
    return save(figure, path)


def _draw(axes: Axes, atoms: Atoms, colours: NDArray[np.float64]) -> None:
    """Atoms from the back to the front, each with its element."""
    periodic = bool(atoms.pbc.any())
    picture = Matplotlib(
        _bare(atoms),
        axes,
        rotation="-78x,12y" if periodic else "",
        colors=colours[:, :3],
        radii=0.8,
        show_unit_cell=2 if atoms.pbc.all() else 0,
    )
    picture.write()
    for depth, patch in enumerate(axes.patches):
        patch.set_zorder(1.0 + depth)
    circles = [patch for patch in axes.patches if isinstance(patch, Circle)]
    if len(atoms) > _MOST_SYMBOLS or len(circles) != len(atoms):
        return
    order = picture.positions[: len(atoms), 2].argsort()
    for patch, element in zip(circles, np.array(atoms.get_chemical_symbols())[order], strict=True):
        x, y = patch.center
        axes.text(x, y, element, ha="center", va="center", fontsize=6.5, zorder=patch.get_zorder())


def _bare(atoms: Atoms) -> Atoms:
    """Elements, positions and cell; a molecule is turned so that its two longest axes lie in the picture."""
    positions = atoms.positions - atoms.positions.mean(axis=0)
    if atoms.pbc.any():
        return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    axes = np.linalg.svd(positions, full_matrices=True)[2] if len(atoms) > 1 else np.eye(3)
    axes[2] *= np.sign(np.linalg.det(axes))  # a rotation shows no mirror image
    return Atoms(atoms.numbers, positions @ axes.T)
