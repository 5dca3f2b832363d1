"""The model as LAMMPS sees it: one TorchScript module with network, sketch, uncertainty and metadata.

Rule of precision: *parameters* follow the precision that the user of the file asks for (mixed and single: float32,
double: float64); *buffers* (energy shifts, posterior factors, calibration) stay float64.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ubmd.models.gmnn import GaussianMomentNetwork
from ubmd.uncertainty import DistanceUncertainty, GradientSketch, LastLayerSketch, PosteriorUncertainty


class DeployedModel(nn.Module):
    """Energies, sketched features and their derivatives with respect to ``edge_vector``.

    Arguments of every evaluation: species int64 [n_local + n_ghost] (indices into metadata's ``elements``),
    edge_index int64 [2, P] (row 0 the centre i < n_local, row 1 the neighbour), edge_vector [P, 3] = x_j - x_i in Å,
    n_local. Energies in eV (float64), phi in the network's precision.
    """

    energy_scale: Tensor
    energy_shift: Tensor

    def __init__(
        self,
        model: GaussianMomentNetwork,
        sketch: GradientSketch | LastLayerSketch,
        metadata: str = "{}",
        kind: str = "posterior",
    ) -> None:
        super().__init__()
        self.descriptor = model.descriptor
        self.network = model.network
        self.sketch = sketch
        self.structure_uncertainty = _make_uncertainty(kind, sketch.projections)
        self.atom_uncertainty = _make_uncertainty(kind, sketch.projections)
        self.register_buffer("energy_scale", (model.constant * model.scale).detach().clone())
        self.register_buffer("energy_shift", (model.constant * model.shift).detach().clone())
        self.n_features = sketch.projections
        self.description = metadata

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, p]), both attached to the graph of edge_vector."""
        x0 = self.descriptor(species, edge_index, edge_vector, n_local)
        y, x1, x2, s1, s2 = self.network(x0)
        scale = self.energy_scale.index_select(0, species[:n_local])
        delta3 = scale.to(y.dtype).unsqueeze(1)
        energy = scale * y.to(scale.dtype) + self.energy_shift.index_select(0, species[:n_local])
        return energy, self.features(x0, x1, x2, s1, s2, delta3)

    def features(self, x0: Tensor, x1: Tensor, x2: Tensor, s1: Tensor, s2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the layers' inputs, the activation slopes and delta^3 = c sigma_Z [n, 1]."""
        delta1, delta2 = self.network.gradient_factors(s1, s2, delta3)
        return self.sketch(x0, x1, x2, delta1, delta2, delta3)

    @torch.jit.export
    def forces(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], d sum(E)/d edge_vector [P, 3]); the network's part of the derivative is in closed form."""
        edge = edge_vector.detach().requires_grad_(True)
        x0 = self.descriptor(species, edge_index, edge, n_local)
        y, _, _, s1, s2 = self.network(x0.detach())
        scale = self.energy_scale.index_select(0, species[:n_local])
        delta1, _ = self.network.gradient_factors(s1, s2, scale.to(y.dtype).unsqueeze(1))
        energy = (scale * y.to(scale.dtype) + self.energy_shift.index_select(0, species[:n_local])).detach()
        return energy, edge_gradient(x0, edge, self.network.input_gradient(delta1))

    @torch.jit.export
    def bias(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int, w: Tensor) -> Tensor:
        """d(sum w·phi)/d edge_vector [P, 3] for w [p] (all atoms alike) or [n_local, p]."""
        edge = edge_vector.detach().requires_grad_(True)
        phi = self.forward(species, edge_index, edge, n_local)[1]
        return edge_gradient(phi, edge, w.to(phi.dtype).expand_as(phi))

    @torch.jit.export
    def uncertainty(self, phi_mean: Tensor) -> Tensor:
        """Calibrated structure uncertainty u (0-dim, eV/atom) of the mean feature [p]."""
        return self.structure_uncertainty(phi_mean.unsqueeze(0)).squeeze(0)

    @torch.jit.export
    def atomic_uncertainties(self, phi: Tensor) -> Tensor:
        """Calibrated atomic uncertainties [n_local], eV/Å, of atomic features [n_local, p]."""
        return self.atom_uncertainty(phi)

    @torch.jit.export
    def metadata(self) -> str:
        """The JSON record of the file."""
        return self.description


class LastLayerModel(DeployedModel):
    """The same with features of the last layer only."""

    def features(self, x0: Tensor, x1: Tensor, x2: Tensor, s1: Tensor, s2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the last hidden state and delta^3."""
        return self.sketch(x2, delta3)


def _make_uncertainty(kind: str, projections: int) -> Any:
    """The module of a kind; Any, because each kind is fitted in its own way."""
    return DistanceUncertainty(projections) if kind == "distance" else PosteriorUncertainty(projections)


def edge_gradient(output: Tensor, edge: Tensor, cotangent: Tensor) -> Tensor:
    """Vector-Jacobian product of ``output`` with respect to ``edge``; zeros where there are no pairs."""
    if edge.size(0) == 0:
        return torch.zeros_like(edge)
    cotangents: list[Tensor | None] = [cotangent]
    gradient = torch.autograd.grad([output], [edge], cotangents)[0]
    assert gradient is not None
    return gradient.detach()
