"""Ethanol from which an atom or the CH3 group is pulled away: does an uncertainty take that for something known?

Networks are trained on displaced molecules, all of them whole. What is far enough away is no neighbour of the rest any
more: features that see only what is near might then show nothing new.

``python tests/helpers/bond_scan.py`` trains Gaussian-moment networks (60, 100, 200 epochs, three seeds) and prints the
smallest `margin` of each kind of uncertainty and bond; ``... bond_scan.py FOLDER`` writes the labels into a folder;
``... bond_scan.py model.pt FOLDER`` is about any model that was trained on them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.calculator import Model
from ubmd.data.extxyz import write_structures
from ubmd.potentials.fitting import export_checkpoints
from ubmd.potentials.gmnn.backend import GaussianMoments
from ubmd.potentials.interface import Labels, TrainingTable
from ubmd.potentials.members import train_networks
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings

NETWORK = ModelSettings(cutoff=4.0, n_radial=3, n_basis=5, hidden=(16, 16))

PULLED = {"C-H": (0, [7]), "O-H": (2, [3]), "C-C": (1, [0, 6, 7, 8])}
"""Bond -> the atom that stays, and those that leave, the bonded one first."""


def labelled_ethanol(count: int, reference: Calculator, seed: int = 0) -> list[Atoms]:
    """Molecules whose atoms are displaced by 0.05 Å (standard deviation in each direction)."""
    found = []
    for k in range(count):
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.05, seed=1000 * seed + k)
        atoms.calc = reference
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces().copy()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        found.append(atoms)
    return found


def length(atoms: Atoms, bond: str) -> float:
    """Å."""
    stays, (leaves, *_) = PULLED[bond]
    return float(atoms.get_distance(stays, leaves))


def pulled(bond: str, lengths: np.ndarray) -> list[Atoms]:
    """The molecule at rest, with this bond so long (Å); what leaves is moved as it is, along the bond."""
    stays, leave = PULLED[bond]
    rest = molecule("CH3CH2OH")
    vector = rest.positions[leave[0]] - rest.positions[stays]
    found = []
    for value in lengths:
        atoms = rest.copy()
        atoms.positions[leave] += vector * (value / np.linalg.norm(vector) - 1.0)
        found.append(atoms)
    return found


def scan(model: Model, whole: list[Atoms], bond: str) -> tuple[np.ndarray, np.ndarray]:
    """(lengths in Å from half an Å beyond the longest one in ``whole`` to 8 Å, largest u_i in eV/Å at each)."""
    start = max(length(atoms, bond) for atoms in whole) + 0.5
    lengths = np.arange(start, 8.0 + 1e-9, 0.1)
    return lengths, np.array([prediction.atomic_u.max() for prediction in model.predict(pulled(bond, lengths))])


def margin(model: Model, training: list[Atoms], held_out: list[Atoms], bond: str) -> float:
    """The smallest u_i of the scan relative to whole molecules that are held out: to the median of their largest u_i.

    Not above 1: at some length, it looks as if it were known.
    """
    _, values = scan(model, [*training, *held_out], bond)
    known = [prediction.atomic_u.max() for prediction in model.predict(held_out)]
    return float(values.min() / np.median(known))


def sets(reference: Calculator) -> tuple[list[Atoms], list[Atoms]]:
    """Labels for training, and held out."""
    return labelled_ethanol(32, reference), labelled_ethanol(12, reference, 1)


def trained(sets: tuple[list[Atoms], list[Atoms]], epochs: int, seed: int, folder: Path) -> list[Path]:
    """Weights of three small networks."""
    table = TrainingTable(NETWORK, TrainingSettings(epochs=epochs, batch_size=8, threads=1))
    return train_networks(GaussianMoments(), 3, table, Labels(*sets), folder, seed, None, None)


def with_uncertainty(kind: str, networks: list[Path], sets: tuple[list[Atoms], list[Atoms]], path: Path) -> Model:
    """A model file of one network, or of all as an ensemble."""
    uncertainty = UncertaintySettings.model_validate({"kind": kind, "projections": 64})
    chosen = networks[: uncertainty.networks]
    export_checkpoints(GaussianMoments(), chosen, NETWORK, *sets, uncertainty, path, {})
    return Model(path, "double")


def print_margins(found: list[dict[str, float]], name: str) -> None:
    """The smallest ones."""
    print(f"{name:11s}", "  ".join(f"{bond} {min(each[bond] for each in found):.2f}" for bond in PULLED), flush=True)


def of_gaussian_moments(labels: tuple[list[Atoms], list[Atoms]], folder: Path) -> None:
    """Margins of all kinds of uncertainty."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in GaussianMoments.uncertainties}
    for epochs, seed in ((epochs, seed) for epochs in (60, 100, 200) for seed in range(3)):
        networks = trained(labels, epochs, seed, folder / f"{epochs}_{seed}")
        for kind, rows in found.items():
            model = with_uncertainty(kind, networks, labels, folder / "model.pt")
            rows.append({bond: margin(model, *labels, bond) for bond in PULLED})
    for kind, rows in found.items():
        print_margins(rows, kind)


def main(*words: str) -> None:
    """See the top of this file."""
    from tblite.ase import TBLite

    torch.set_num_threads(1)
    labels = sets(TBLite(method="GFN2-xTB", verbosity=0))
    if len(words) == 1:
        for name, structures in zip(("train", "valid"), labels, strict=True):
            write_structures(Path(words[0], f"{name}.extxyz"), structures)
    elif words:
        read = [list(ase.io.iread(Path(words[1], f"{name}.extxyz"))) for name in ("train", "valid")]
        model = Model(words[0])
        print_margins([{bond: margin(model, read[0], read[1], bond) for bond in PULLED}], Path(words[0]).stem)
    else:
        with tempfile.TemporaryDirectory() as folder:
            of_gaussian_moments(labels, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
