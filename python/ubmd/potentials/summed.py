"""A network plus its baseline as one module with the interface of a model file (see `deployed.Deployed`).

Energies and their gradients add; features and uncertainties are the network's, and so are their gradients.
"""

from typing import Any

import torch
from torch import Tensor

from ubmd.potentials.baseline import Baseline
from ubmd.potentials.deployed import Deployed, edge_gradient


class _Sum(Deployed):
    """The generic part of the interface."""

    def __init__(self, network: Deployed, baseline: Baseline) -> None:
        """``network``: with a fitted and calibrated uncertainty."""
        super().__init__(network.n_features, "{}")
        self.network: Any = network
        self.baseline = baseline

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, p]), both attached to the graph of edge_vector."""
        energy, phi = self.network(species, edge_index, edge_vector, n_local)
        return energy + self.baseline(species, edge_index, edge_vector, n_local)[0], phi

    @torch.jit.export
    def forces(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], d sum(E)/d edge_vector [P, 3]), detached."""
        energy, gradient = self.network.forces(species, edge_index, edge_vector, n_local)
        edge = edge_vector.detach().requires_grad_(True)
        more = self.baseline(species, edge_index, edge, n_local)[0]
        return energy + more.detach(), gradient + edge_gradient(more, edge, torch.ones_like(more))

    @torch.jit.export
    def bias(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int, w: Tensor) -> Tensor:
        """d(sum w·phi)/d edge_vector [P, 3] for w [p] (all atoms alike) or [n_local, p]."""
        gradient: Tensor = self.network.bias(species, edge_index, edge_vector, n_local, w)
        return gradient

    @torch.jit.export
    def uncertainty(self, phi_mean: Tensor) -> Tensor:
        """Calibrated structure uncertainty u (0-dim, eV/atom) of the mean feature [p]."""
        u: Tensor = self.network.uncertainty(phi_mean)
        return u


class _OfFeatures(_Sum):
    """With uncertainties of atoms from their features."""

    @torch.jit.export
    def atomic_uncertainties(self, phi: Tensor) -> Tensor:
        """Calibrated atomic uncertainties [n_local], eV/Å, of atomic features [n_local, p]."""
        u: Tensor = self.network.atomic_uncertainties(phi)
        return u


class _OfMembers(_Sum):
    """With uncertainties of atoms from the members' forces."""

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, M]): by the interface, phi holds energies of members, so each has the repulsion.

        What all have in common does not change their spread; LAMMPS takes the mean of their forces as force.
        """
        energy, phi = self.network(species, edge_index, edge_vector, n_local)
        more, repulsion = self.baseline(species, edge_index, edge_vector, n_local)
        return energy + more, phi + repulsion.unsqueeze(1)

    @torch.jit.export
    def force_uncertainties(self, forces: Tensor) -> Tensor:
        """Calibrated atomic uncertainties [n], eV/Å, of the members' forces [n, 3, M]."""
        u: Tensor = self.network.force_uncertainties(forces)
        return u


class _Fast(_Sum):
    """The fast part of the interface: all but the energies and their gradient is the network's."""

    @torch.jit.export
    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Energies [n], their gradient [P, 3] and the network's tape (see `Deployed`)."""
        energy, gradient, tape = self.network.evaluate(species, first, neighbours, edge_vector, keep)
        with torch.no_grad():
            more, total = self.baseline.evaluate(species, first, neighbours, edge_vector, gradient)
            return energy + more, total, tape

    @torch.jit.export
    def by_structure(self, n: int) -> bool:
        """Whether n atoms cost less by structure than atom by atom."""
        cheaper: bool = self.network.by_structure(n)
        return cheaper

    @torch.jit.export
    def features(self, tape: list[Tensor], by_structure: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(sums, phi, factors) of an evaluation that kept its tape (see `Deployed`)."""
        found: tuple[list[Tensor], Tensor, list[Tensor]] = self.network.features(tape, by_structure)
        return found

    @torch.jit.export
    def feature_sum(self, sums: list[Tensor]) -> Tensor:
        """Sum of the raw features over all atoms [p] (float64) from the sums of all chunks."""
        total: Tensor = self.network.feature_sum(sums)
        return total

    @torch.jit.export
    def directions(self, w: Tensor, by_structure: bool) -> list[Tensor]:
        """What ``feature_gradient`` needs of w [p]."""
        found: list[Tensor] = self.network.directions(w, by_structure)
        return found

    @torch.jit.export
    def feature_gradient(
        self, tape: list[Tensor], factors: list[Tensor], directions: list[Tensor], w: Tensor
    ) -> Tensor:
        """d(sum_i w·phi_i)/d edge_vector [P, 3] (float64)."""
        gradient: Tensor = self.network.feature_gradient(tape, factors, directions, w)
        return gradient


class _FastOfFeatures(_OfFeatures, _Fast):
    """Both, with what only networks with features have."""

    @torch.jit.export
    def kept_for_bias(self, tape: list[Tensor], by_structure: bool) -> list[Tensor]:
        """What ``feature_gradient`` needs of a tape after ``features``."""
        kept: list[Tensor] = self.network.kept_for_bias(tape, by_structure)
        return kept


class _FastOfMembers(_OfMembers, _Fast):
    """Both, with what only ensembles have; there the repulsion, the same for all members, is left out."""

    @torch.jit.export
    def member_gradients(self, tape: list[Tensor]) -> Tensor:
        """d sum(E_m)/d edge_vector [M, P, 3] (float64)."""
        gradients: Tensor = self.network.member_gradients(tape)
        return gradients

    @torch.jit.export
    def member_bias(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, cotangents: Tensor
    ) -> Tensor:
        """d(sum_m cotangents_m·gradient_m)/d edge_vector [P, 3] (float64) for cotangents [M, P, 3]."""
        gradient: Tensor = self.network.member_bias(species, first, neighbours, edge_vector, cotangents)
        return gradient


def summed(network: Deployed, baseline: Baseline) -> Deployed:
    """The sum of both, with the parts of the interface that the network has."""
    fast = hasattr(network, "evaluate")
    if hasattr(network, "force_uncertainties"):
        return _FastOfMembers(network, baseline) if fast else _OfMembers(network, baseline)
    return _FastOfFeatures(network, baseline) if fast else _OfFeatures(network, baseline)


def lone_atoms(module: Deployed, n_elements: int) -> list[float]:
    """Energies that a module gives to one atom of each element without neighbours, eV."""
    species = torch.arange(n_elements)
    pairs, vectors = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64)
    with torch.no_grad():
        energies: list[float] = module(species, pairs, vectors, n_elements)[0].tolist()
    return energies
