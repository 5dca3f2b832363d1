"""What a network is added to: the screened repulsion of nuclei, and the energies of isolated atoms.

A network learns what the baseline leaves of the labels (`remainder`); its model file gives the sum (`summed`).

Repulsion: J. F. Ziegler, J. P. Biersack and U. Littmark, The Stopping and Range of Ions in Solids (Pergamon, 1985);
k = e^2/(4 pi eps_0), Z the atomic numbers:

    V(r) = k Z1 Z2/r phi(r/a) f(r/R),  phi(s) = sum_m c_m exp(-d_m s),  a = 0.46850/(Z1^0.23 + Z2^0.23) Å

f, a polynomial, ends it at R, the sum of the covalent radii, where f and its first two derivatives are zero
(Gasteiger, Groß and Günnemann, "Directional message passing for molecular graphs", ICLR 2020, eq. 8; with p = 6):

    f(x) = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2)

Half of a pair's energy belongs to either of its atoms.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor, nn

from ubmd.data.graph import VOIGT, build_graph, collate
from ubmd.errors import DataError, SettingsError
from ubmd.settings import ModelSettings
from ubmd.spelling import nearest

COULOMB = 14.399645  # e^2/(4 pi eps_0), eV Å
SCREENING = (0.18175, 0.50986, 0.28022, 0.02817)  # c_m
DECAY = (3.19980, 0.94229, 0.40290, 0.20162)  # d_m
LENGTH, POWER = 0.46850, 0.23  # of the screening length a, Å
ENVELOPE = 6  # p
SETTINGS = {"baseline", "atom_energies"}  # of [model]
_DECIMALS = 9  # of labels, eV and eV/Å: another processor may differ in the last bits, which are no other labels


class Baseline(nn.Module):
    """Energies of atoms that are sums over their own pairs, in closed form, and constants of the elements."""

    repulsive: Final[bool]
    p: Final[int]
    atom_energy: Tensor
    of_pair: Tensor
    decay: Tensor
    factors: Tensor

    def __init__(self, model: ModelSettings, elements: Sequence[str]) -> None:
        """``elements``: the species 0, 1, ...; SettingsError as in `check_baseline`."""
        super().__init__()
        check_baseline(model, elements)
        self.repulsive = model.baseline == "zbl"
        self.p = ENVELOPE
        self.has_energies = bool(model.atom_energies)
        self.n_elements = len(elements)
        numbers = np.array([atomic_numbers[element] for element in elements])
        z, radius = numbers.astype(float), covalent_radii[numbers]
        ends = radius[:, None] + radius
        self.reach = float(ends.max()) if self.repulsive else 0.0
        strength = 0.5 * COULOMB * np.outer(z, z)  # one half for each atom of a pair
        inverse_length = np.add.outer(z**POWER, z**POWER) / LENGTH
        tables = {
            "atom_energy": np.array([model.atom_energies.get(element, 0.0) for element in elements]),
            "of_pair": np.stack([strength, inverse_length, ends], 2).reshape(-1, 3),
            "decay": np.array(DECAY),
            "factors": np.stack([SCREENING, -np.multiply(SCREENING, DECAY)], 1),  # of phi and its slope
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table))

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(energies [n_local] in eV, repulsion [n_local] in eV alone), both attached to the graph of edge_vector.

        The arguments are those of `ubmd.potentials.deployed.Deployed`; all results of this class are float64.
        """
        near = self.near(edge_vector)
        # of a network with message passing, others have pairs, too
        near = near[edge_index[0].index_select(0, near) < n_local]
        centre, neighbour = edge_index[0].index_select(0, near), edge_index[1].index_select(0, near)
        kinds = species.index_select(0, centre), species.index_select(0, neighbour)
        energy, _ = self.pairs(kinds[0], kinds[1], edge_vector.index_select(0, near).to(torch.float64))
        repulsion = torch.zeros(n_local, dtype=torch.float64, device=species.device).index_add(0, centre, energy)
        return repulsion + self.atom_energy.index_select(0, species[:n_local]), repulsion

    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(energies [n] in eV, ``gradient`` [P, 3] plus dSum(E)/d edge_vector in eV/Å), for pairs sorted by centre.

        The arguments are those of the fast part of `ubmd.potentials.deployed.Deployed`.
        """
        energies = self.atom_energy.index_select(0, species)
        if not self.repulsive:
            return energies, gradient
        near = self.near(edge_vector)
        centre = torch.searchsorted(first[1:], near, right=True)
        kinds = species.index_select(0, centre), neighbours.index_select(0, near)
        energy, slope = self.pairs(kinds[0], kinds[1], edge_vector.index_select(0, near).to(torch.float64))
        return energies.index_add(0, centre, energy), gradient.index_add(0, near, slope.to(gradient.dtype))

    def near(self, edge_vector: Tensor) -> Tensor:
        """Pairs that any two elements may repel at, int64 [m]: the others cost no more than this comparison."""
        return torch.nonzero(squares(edge_vector.detach()) < self.reach * self.reach).squeeze(1)

    def pairs(self, first: Tensor, second: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Half of V(r) [m] in eV, attached to the vectors [m, 3], and its derivative by them [m, 3], eV/Å."""
        strength, inverse_length, end = self.of_pair.index_select(0, first * self.n_elements + second).unbind(1)
        r = squares(vectors).sqrt()
        exponentials = torch.exp(-self.decay * (r * inverse_length).unsqueeze(1))
        phi, slope = (exponentials @ self.factors).unbind(1)
        x = (r / end).clamp(max=1.0)  # f and its slope are zero there
        p, top = self.p, 0.5 * self.p * (self.p + 1)  # top: size of the last coefficient
        f = 1.0 - x**p * (0.5 * (p + 1) * (p + 2) - x * (p * (p + 2) - x * top))
        f_slope = -top * (p + 2) * x ** (p - 1) * (1.0 - x).square() / end
        energy = strength * phi * f / r
        derivative = strength * ((slope * inverse_length - phi / r) * f + phi * f_slope) / r
        return energy, (derivative / r).unsqueeze(1) * vectors

    def record(self, elements: Sequence[str]) -> dict[str, Any]:
        """JSON values for the record of a model file: what is added, with its parameters."""
        radii = {element: float(covalent_radii[atomic_numbers[element]]) for element in elements}
        repulsion = {"kind": "zbl", "envelope": ENVELOPE, "covalent_radii": radii} if self.repulsive else {}
        energies = dict(zip(elements, self.atom_energy.tolist(), strict=True))
        return repulsion | ({"atom_energies": energies} if self.has_energies else {})


def squares(vectors: Tensor) -> Tensor:
    """Squared lengths [P] of vectors [P, 3]; column by column, which is nine times as fast as a sum over the rows."""
    x, y, z = vectors.unbind(1)
    return x * x + y * y + z * z


def baseline_settings(model: ModelSettings) -> dict[str, Any]:
    """Settings of the baseline, by name. Those that are not set are left out: earlier versions do not know them."""
    return {name: value for name in sorted(SETTINGS) if (value := getattr(model, name))}


def has_baseline(model: ModelSettings) -> bool:
    """Whether a network with these settings is one part of a sum."""
    return bool(baseline_settings(model))


def check_baseline(model: ModelSettings, elements: Iterable[str]) -> None:
    """Whether the settings cover these elements; nothing without a baseline.

    Raises:
        SettingsError: an energy is missing, or is that of no element; the repulsion ends beyond the cutoff.
    """
    elements = list(elements)
    unknown = [element for element in elements if element not in atomic_numbers]
    if unknown and has_baseline(model):
        raise SettingsError(f"model.elements names '{unknown[0]}', which is not an element.")
    if model.atom_energies:
        _check_names(model.atom_energies)
        missing = sorted(set(elements) - set(model.atom_energies))
        if missing:
            raise SettingsError(
                f"model.atom_energies lacks {missing[0]}; give the energy of an isolated atom of each element, eV."
            )
    if model.baseline is not None and model.known_cutoff is not None:
        check_reach(elements, model.known_cutoff, "model.cutoff")


def check_reach(elements: Iterable[str], cutoff: float, name: str) -> None:
    """SettingsError if the repulsion between two of these elements ends beyond ``cutoff``, Å, called ``name``."""
    radius, element = max((float(covalent_radii[atomic_numbers[e]]), e) for e in elements)
    if 2.0 * radius > cutoff:
        raise SettingsError(
            f"model.baseline = 'zbl' ends at {2.0 * radius:.3g} Å between two atoms of {element}, beyond {name} = "
            f"{cutoff:g} Å: raise the cutoff, or remove model.baseline."
        )


def _check_names(energies: Iterable[str]) -> None:
    """SettingsError if a key of model.atom_energies is no element."""
    for name in energies:
        if atomic_numbers.get(name, 0) == 0:
            meant = nearest(name, [symbol for symbol, number in atomic_numbers.items() if number > 0])
            hint = f"did you mean '{meant}'?" if meant else "its keys are symbols such as H and O."
            raise SettingsError(f"model.atom_energies.{name}: there is no element '{name}'; {hint}")


def remainder(structures: Sequence[Atoms], model: ModelSettings) -> list[Atoms]:
    """Copies of labelled structures whose energies, forces and stresses lack the baseline: what a network learns.

    Without a baseline the structures themselves. Labels that a structure lacks are still missing.

    Raises:
        SettingsError: see `check_baseline`.
        DataError: a structure without a valid geometry.
    """
    if not has_baseline(model) or not structures:
        return list(structures)
    elements = sorted({symbol for atoms in structures for symbol in atoms.symbols} | set(model.elements or ()))
    baseline = Baseline(model, elements)
    found = []
    for number, atoms in enumerate(structures):
        try:
            found.append(_without(atoms, baseline, elements))
        except DataError as error:
            raise DataError(f"structure {number}: {error}") from None
    return found


def _without(atoms: Atoms, baseline: Baseline, elements: Sequence[str]) -> Atoms:
    """A copy of one structure whose labels lack the baseline."""
    batch = collate([build_graph(atoms, elements, max(baseline.reach, 0.1))])
    zero = torch.zeros_like(batch.edge_vector)
    with torch.no_grad():
        energies, gradient = baseline.evaluate(batch.species, batch.first, batch.neighbours, batch.edge_vector, zero)
    parts: dict[str, Any] = {"energy": float(energies.sum()), "forces": batch.forces_from(gradient).numpy()}
    if float(batch.volume) > 0.0:
        parts["stress"] = batch.virials_from(gradient)[0].numpy()[VOIGT] / float(batch.volume)
    labels = atoms.calc.results if atoms.calc is not None else {}
    copy: Atoms = atoms.copy()
    rest = {
        name: np.round(labels[name] - part, _DECIMALS) for name, part in parts.items() if labels.get(name) is not None
    }
    copy.calc = SinglePointCalculator(copy, **rest)
    return copy
