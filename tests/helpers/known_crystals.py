"""Crystals whose clusters and parameters were counted elsewhere, too."""

import numpy as np
from ase import Atoms
from ase.build import bulk


def silicon() -> Atoms:
    return bulk("Si", "diamond", 5.43)


def boron_arsenide() -> Atoms:
    return bulk("BAs", "zincblende", 4.777)


def tin_selenide() -> Atoms:
    """Pnma SnSe as measured at room temperature."""
    places = []
    for x, z in ((0.118, 0.103), (0.855, 0.482)):
        places += [(x, 0.25, z), (-x, 0.75, -z), (0.5 - x, 0.75, 0.5 + z), (0.5 + x, 0.25, 0.5 - z)]
    return Atoms("Sn4Se4", scaled_positions=places, cell=[11.501, 4.153, 4.445], pbc=True)


def displaced(n: int, seed: int = 0, size: float = 0.2) -> np.ndarray:
    """Random displacements [n, 3], Å."""
    return np.random.default_rng(seed).normal(scale=size, size=(n, 3))
