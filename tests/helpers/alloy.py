"""Cu3Au with labels of EMT, and a small model of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from small_model import with_emt_labels

from ubmd.data.extxyz import write_structures
from ubmd.data.labels import LABELS, labels_of
from ubmd.potentials.fitting import export_checkpoints
from ubmd.potentials.gmnn.backend import GaussianMoments
from ubmd.potentials.interface import Labels, TrainingTable
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings

__all__ = ["LABELS", "alloy", "shaken", "trained_alloy", "without"]

MODEL = ModelSettings(cutoff=4.0, n_radial=2, n_basis=4, hidden=(12, 12))


def shaken(atoms: Atoms, seed: int) -> Atoms:
    """Moved by 0.1 Å, with EMT labels: a stress, too, where it is periodic in all directions."""
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).uniform(-0.1, 0.1, (len(atoms), 3))
    return with_emt_labels(atoms)


def alloy(seed: int, repeat: int = 1) -> Atoms:
    """Four atoms per cell, the first is gold."""
    atoms = bulk("Cu", cubic=True, a=3.75)
    atoms.symbols[0] = "Au"
    return shaken(atoms.repeat((repeat, 1, 1)), seed)


def without(atoms: Atoms, *names: str) -> Atoms:
    """A copy that lacks these labels."""
    copy, labels = atoms.copy(), {name: value for name, value in labels_of(atoms).items() if name not in names}
    copy.calc = SinglePointCalculator(copy, **labels) if labels else None
    return copy


def trained_alloy(folder: Path) -> Path:
    """A folder with model.pt, and with test.extxyz: six structures whose config_type is bulk or strained."""
    training, validation = [alloy(seed) for seed in range(8)], [alloy(seed) for seed in range(10, 16)]
    backend, table = GaussianMoments(), TrainingTable(MODEL, TrainingSettings(epochs=4, threads=1))
    path = backend.train(Labels(training, validation), table, folder / "training", None, 0, None)
    uncertainty = UncertaintySettings(projections=16, alpha=0.3)
    export_checkpoints(backend, [path], MODEL, training, validation, uncertainty, folder / "model.pt", {})
    test = [alloy(seed) for seed in range(20, 26)]
    for k, atoms in enumerate(test):
        atoms.info["config_type"] = "bulk" if k % 2 else "strained"
    write_structures(folder / "test.extxyz", test)
    return folder
