"""Evaluate any module with a model file's interface: energies, gradients, features, atomic uncertainties."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubmd.data.graph import scatter_forces


class Evaluation(NamedTuple):
    """energy [n] eV; gradient dSum(E)/d(edge_vector) [P, 3] eV/Å; phi [n, p] float64; atomic_u [n] eV/Å."""

    energy: Tensor
    gradient: Tensor
    phi: Tensor
    atomic_u: Tensor


def is_ensemble(module: Any) -> bool:
    """Whether atomic uncertainties come from the members' forces (see `models.deployed.Deployed`)."""
    return hasattr(module, "force_uncertainties")


def evaluate(module: Any, species: Tensor, edge_index: Tensor, edge_vector: Tensor) -> Evaluation:
    """Everything about the atoms of one graph, or of several side by side."""
    n = len(species)
    energy, gradient = module.forces(species, edge_index, edge_vector, n)
    if is_ensemble(module):
        edge = edge_vector.detach().requires_grad_(True)
        phi = module(species, edge_index, edge, n)[1]
        atomic_u = module.force_uncertainties(member_forces(phi, edge_index, edge))
    else:
        with torch.no_grad():
            phi = module(species, edge_index, edge_vector, n)[1]
            atomic_u = module.atomic_uncertainties(phi)
    return Evaluation(energy.double(), gradient.double(), phi.detach().double(), atomic_u.double())


def member_forces(phi: Tensor, edge_index: Tensor, edge: Tensor, create_graph: bool = False) -> Tensor:
    """Forces [n, 3, M] of the members of an ensemble from phi [n, M], attached to the graph of ``edge`` if asked."""
    columns = []
    for m in range(phi.size(1)):
        gradient = torch.zeros_like(edge)
        if len(edge):
            (gradient,) = torch.autograd.grad(phi[:, m].sum(), edge, retain_graph=True, create_graph=create_graph)
        columns.append(scatter_forces(edge_index, gradient.double(), len(phi)))
    return torch.stack(columns, 2)


def atomic_uncertainty_sum(module: Any, species: Tensor, edge_index: Tensor, edge: Tensor) -> Tensor:
    """Sum of the atomic uncertainties, attached to the graph of ``edge`` (which requires a gradient)."""
    phi = module(species, edge_index, edge, len(species))[1]
    if is_ensemble(module):
        return module.force_uncertainties(member_forces(phi, edge_index, edge, create_graph=True)).sum()
    return module.atomic_uncertainties(phi).sum()
