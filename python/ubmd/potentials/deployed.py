"""The interface of a model file, and modules of other programs with an uncertainty of ubmd."""

from typing import Any

import torch
from torch import Tensor, nn


class Deployed(nn.Module):
    """The interface of a model file. Energies in eV (float64), vectors in Å.

    Generic part, for any model, with autograd. Arguments of ``forward``, ``forces`` and ``bias``: species int64
    [n_local + n_ghost] (indices into metadata's ``elements``), edge_index int64 [2, P] (row 0 the centre i < n_local,
    row 1 the neighbour), edge_vector [P, 3] = x_j - x_i, n_local. With message passing (``layers`` > 1 in the record)
    other atoms are centres, too: those that send messages to the atoms below n_local. Besides what this class names, a
    file has ``forces`` and one of

    - ``atomic_uncertainties(phi [n_local, p])`` -> u_i [n_local]: of each atom's own features;
    - ``force_uncertainties(forces [n, 3, p])`` -> u_i [n]: column m of phi is then the atomic energy of member m of an
      ensemble (up to a constant), and ``forces`` are the members' forces.

    Fast part (optional: a file without ``evaluate`` has none of it), every derivative in closed form and all results
    detached. Pairs are sorted by centre: species int64 [n] of the centres, first int64 [n + 1] (the pairs of centre i
    are first[i] .. first[i + 1] - 1), neighbours int64 [P] (the *element index* of each pair's neighbour), edge_vector
    [P, 3]. A structure may be evaluated in chunks of centres, each with its tape:

    - ``evaluate(species, first, neighbours, edge_vector, keep)`` -> (E [n], dSum(E)/d edge_vector [P, 3] float64,
      tape); the tape is empty unless ``keep``, which everything below needs.
    - ``by_structure(n)``: whether sums and gradient of the structure's features are cheaper by the two identities
      (weight gradient; tangent along one direction of the weights) than atom by atom, for n atoms on this process. The
      methods below take its result, or False where features of atoms are needed.
    - ``features(tape, by_structure)`` -> (sums, phi [n, p] (no rows by structure), factors). The sums of chunks are
      added tensor by tensor; ``feature_sum(sums)`` then is sum_i phi_i [p] (float64).
    - ``directions(w [p], by_structure)``: what ``feature_gradient`` needs of w, the same for all chunks.
    - ``feature_gradient(tape, factors, directions, w)`` -> d(sum_i w·phi_i)/d edge_vector [P, 3] float64. With no
      directions w is [n, p], different from atom to atom.
    - optional: ``kept_for_bias(tape, by_structure)`` -> the tape with empty tensors in place of what that needs no more
      after ``features``: LAMMPS keeps it for all atoms of a process until the bias is known.
    - optional: ``uncertainties(means [R, p])`` -> u [R] and du/d(mean) [R, p] of several structures, detached: for
      replicas that are evaluated together.
    - ensembles: ``member_gradients(tape)`` -> [M, P, 3] float64; ``member_bias(species, first, neighbours, edge_vector,
      cotangents [M, P, 3])`` -> d(sum_m cotangents_m·gradient_m)/d edge_vector [P, 3] float64.
    """

    def __init__(self, n_features: int, metadata: str) -> None:
        super().__init__()
        self.n_features = n_features
        self.description = metadata
        self.structure_uncertainty: Any = None
        self.atom_uncertainty: Any = None

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, p]), both attached to the graph of edge_vector."""
        raise NotImplementedError

    @torch.jit.export
    def bias(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int, w: Tensor) -> Tensor:
        """d(sum w·phi)/d edge_vector [P, 3] for w [p] (all atoms alike) or [n_local, p]."""
        edge = edge_vector.detach().requires_grad_(True)
        phi = self.forward(species, edge_index, edge, n_local)[1]
        return edge_gradient(phi, edge, w.to(phi.dtype).expand_as(phi))

    @torch.jit.export
    def uncertainty(self, phi_mean: Tensor) -> Tensor:
        """Calibrated structure uncertainty u (0-dim, eV/atom) of the mean feature [p]."""
        u: Tensor = self.structure_uncertainty(phi_mean.unsqueeze(0))
        return u.squeeze(0)

    @torch.jit.export
    def metadata(self) -> str:
        """The JSON record of the file."""
        return self.description


class ForeignModule(Deployed):
    """A module of another program with an uncertainty of ubmd: the generic part of the interface, by autograd."""

    def __init__(self, raw: nn.Module, n_features: int) -> None:
        """``raw``: see `ubmd.potentials.interface.RawModule`."""
        super().__init__(n_features, "{}")
        self.raw = raw

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, p]), both attached to the graph of edge_vector."""
        energy, phi = self.raw(species, edge_index, edge_vector, n_local)
        return energy, phi

    @torch.jit.export
    def forces(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], d sum(E)/d edge_vector [P, 3]), detached."""
        edge = edge_vector.detach().requires_grad_(True)
        energy = self.forward(species, edge_index, edge, n_local)[0]
        return energy.detach(), edge_gradient(energy, edge, torch.ones_like(energy))

    @torch.jit.export
    def atomic_uncertainties(self, phi: Tensor) -> Tensor:
        """Calibrated atomic uncertainties [n_local], eV/Å, of atomic features [n_local, p]."""
        u: Tensor = self.atom_uncertainty(phi)
        return u


def edge_gradient(output: Tensor, edge: Tensor, cotangent: Tensor) -> Tensor:
    """Vector-Jacobian product of ``output`` with respect to ``edge``; zeros where there are no pairs."""
    if edge.size(0) == 0:
        return torch.zeros_like(edge)
    cotangents: list[Tensor | None] = [cotangent]
    gradient = torch.autograd.grad([output], [edge], cotangents)[0]
    assert gradient is not None
    return gradient.detach()
