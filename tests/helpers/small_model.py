"""A small model, structures for it, and numerical derivatives."""

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.calculator import Calculator
from ubmd.settings import ModelSettings

ELEMENTS = ["H", "C", "N", "O"]
SETTINGS = ModelSettings(cutoff=4.0, n_radial=3, n_basis=4, hidden=(16, 12))


def labelled(atoms: Atoms, seed: int) -> Atoms:
    """Shaken by 0.05 Å, with random labels."""
    rng = np.random.default_rng(seed)
    atoms = atoms.copy()
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3)))
    return atoms


def with_emt_labels(atoms: Atoms) -> Atoms:
    """The same structure with EMT energy and forces, and stress for cells; returns it."""
    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        labels["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def triclinic(scale: float = 1.0) -> Atoms:
    """A triclinic cell that is smaller than the cutoff."""
    cell = np.array([[3.1, 0.2, 0.0], [0.7, 3.3, 0.1], [-0.4, 0.5, 2.9]]) * scale
    return Atoms("OHC", positions=[[0, 0, 0], [1.1, 0.3, 0.2], [1.4, 1.7, 1.5]], cell=cell, pbc=True)


def central(function: Callable[[np.ndarray], float], x: np.ndarray, h: float) -> np.ndarray:
    """Fourth-order central differences of a scalar function."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = h
        gradient[index] = (
            8 * (function(x + step) - function(x - step)) - (function(x + 2 * step) - function(x - 2 * step))
        ) / (12 * h)
    return gradient


def results_of(calculator: Calculator, atoms: Atoms) -> list[np.ndarray]:
    """Energy, forces, bias forces, uncertainty and stress; the structure is not changed."""
    atoms = atoms.copy()
    atoms.calc = calculator
    values = [atoms.get_potential_energy(), atoms.get_forces(), calculator.get_bias_forces(atoms)]
    return [np.array(value) for value in [*values, *(calculator.results[k] for k in ("uncertainty", "stress"))]]
