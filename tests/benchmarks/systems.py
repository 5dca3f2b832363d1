"""Structures of the benchmarks, and model files with random weights for them.

Speed doesn't depend on what a model has learnt. Its energy scale is tiny here (about 1 meV per atom), so that atoms at
300 K follow the springs that `lammps_runs` puts on them, whatever the random network says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

ROOT = Path(__file__).resolve().parents[2]
ENERGY_SCALE = 1e-3  # eV per atom, and eV/Å
CUTOFF = 5.0  # Å


def magnesium_oxide() -> Atoms:
    """The cubic cell of rocksalt MgO: 8 atoms, 56 neighbours within 5 Å; LAMMPS replicates it."""
    return bulk("MgO", "rocksalt", a=4.21, cubic=True)


def alanine_dipeptide() -> Atoms:
    """22 atoms in vacuum."""
    atoms = read(ROOT / "lammps_examples/alanine_dipeptide/c7eq.extxyz")
    assert isinstance(atoms, Atoms)
    atoms.calc = None
    return atoms


def framework() -> Atoms:
    """A periodic cell with the 76 atoms Al4 C32 H20 O20 of MIL-53(Al) and 68 neighbours within 5 Å.

    Only composition and density are those of the narrow-pore framework: the atoms sit in random order near a grid of
    4 x 4 x 5 sites with four vacancies.
    """
    spacing = 2.01
    sites = spacing * np.array([(x, y, z) for x in range(4) for y in range(4) for z in range(5)], dtype=float)
    rng = np.random.default_rng(53)
    symbols = rng.permutation(["Al"] * 4 + ["C"] * 32 + ["H"] * 20 + ["O"] * 20)
    chosen = np.sort(rng.permutation(len(sites))[: len(symbols)])
    positions = sites[chosen] + rng.normal(0.0, 0.1, (len(symbols), 3))
    return Atoms(list(symbols), positions=positions, cell=spacing * np.array([4.0, 4.0, 5.0]), pbc=True)


@dataclass(frozen=True)
class System:
    """A kind of system: its elements in the order of the LAMMPS types, and its smallest structure."""

    name: str
    elements: tuple[str, ...]
    make: Callable[[], Atoms]
    repeat_for_fit: int = 1  # the uncertainty is fitted on cells that are this much longer


SYSTEMS = {
    system.name: system
    for system in (
        System("mgo", ("Mg", "O"), magnesium_oxide, 2),
        System("alanine", ("H", "C", "N", "O"), alanine_dipeptide),
        System("framework", ("H", "C", "O", "Al"), framework),
    )
}
# name of a model file -> size, projections
MODELS = {"light128": ("light", 128), "light512": ("light", 512), "paper512": ("paper", 512)}


def rattled(atoms: Atoms, count: int, energy_scale: float, seed: int) -> list[Atoms]:
    """Copies shaken by 0.1 Å, with random labels of the given size (eV per atom, eV/Å)."""
    rng = np.random.default_rng(seed)
    copies = []
    for _ in range(count):
        copy = atoms.copy()
        copy.positions += rng.normal(0.0, 0.1, copy.positions.shape)
        energy = energy_scale * len(copy) * rng.normal()
        forces = energy_scale * rng.normal(size=copy.positions.shape)
        copy.calc = SinglePointCalculator(copy, energy=energy, forces=forces)
        copies.append(copy)
    return copies


def write_data(folder: Path, name: str) -> Path:
    """LAMMPS data file of a system; a molecule lies in the middle of a wide box."""
    system = SYSTEMS[name]
    atoms = system.make()
    if not atoms.pbc.any():
        atoms.center(vacuum=20.0)
    path = folder / f"{name}.data"
    write(path, atoms, format="lammps-data", masses=True, specorder=list(system.elements))
    return path


def model_file(folder: Path, name: str, model_name: str, energy_scale: float = ENERGY_SCALE) -> Path:
    """Path of the model file that `write_model` writes."""
    return folder / f"{name}_{model_name}_{energy_scale:g}.pt"


def write_model(folder: Path, name: str, model_name: str, energy_scale: float = ENERGY_SCALE) -> list[str]:
    """Model file of a system: random weights, uncertainty fitted on six rattled structures.

    Returns the operator libraries that the file uses.
    """
    from ubmd.data.graph import build_graph
    from ubmd.potentials.gmnn.export import export_model
    from ubmd.potentials.gmnn.model import GaussianMomentNetwork
    from ubmd.settings import ModelSettings, UncertaintySettings

    system = SYSTEMS[name]
    size, projections = MODELS[model_name]
    structures = rattled(system.make().repeat(system.repeat_for_fit), 8, energy_scale, seed=1)
    model = GaussianMomentNetwork(list(system.elements), ModelSettings(size=size, cutoff=CUTOFF), seed=0)
    model.initialise_energies([build_graph(atoms, list(system.elements), CUTOFF) for atoms in structures])
    settings = UncertaintySettings(projections=projections)
    path = model_file(folder, name, model_name, energy_scale)
    return list(export_model(model, structures[:6], structures[6:], settings, path)["operators"])
