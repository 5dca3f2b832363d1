"""The model as LAMMPS sees it: one TorchScript module with networks, features, uncertainty and metadata.

Rule of precision: *parameters* follow the precision that the user of the file asks for (mixed and single: float32,
double: float64); *buffers* (energy shifts, posterior factors, calibration) stay float64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ubmd.models.gmnn import GaussianMomentNetwork
from ubmd.uncertainty import (
    DistanceUncertainty,
    EnsembleUncertainty,
    ForceSpreadUncertainty,
    GradientSketch,
    LastLayerSketch,
    PosteriorUncertainty,
)


class Potential(nn.Module):
    """One trained network and its energy scales."""

    energy_scale: Tensor
    energy_shift: Tensor

    def __init__(self, model: GaussianMomentNetwork) -> None:
        super().__init__()
        self.descriptor = model.descriptor
        self.network = model.network
        self.register_buffer("energy_scale", (model.constant * model.scale).detach().clone())
        self.register_buffer("energy_shift", (model.constant * model.shift).detach().clone())

    def scales(self, species: Tensor) -> Tensor:
        """c sigma_Z of atoms [n], eV."""
        return self.energy_scale.index_select(0, species)

    def energies(self, y: Tensor, species: Tensor) -> Tensor:
        """Energies [n] (float64, eV) from the network's output [n]."""
        scale = self.scales(species)
        return scale * y.to(scale.dtype) + self.energy_shift.index_select(0, species)

    def atomic_energies(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> Tensor:
        """Energies [n_local] (float64, eV), attached to the graph of edge_vector."""
        y = self.network(self.descriptor(species, edge_index, edge_vector, n_local))[0]
        return self.energies(y, species[:n_local])

    def energies_and_gradient(
        self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int
    ) -> tuple[Tensor, Tensor]:
        """(E [n_local], d sum(E)/d edge_vector [P, 3]); the network's part of the derivative is in closed form."""
        edge = edge_vector.detach().requires_grad_(True)
        x0 = self.descriptor(species, edge_index, edge, n_local)
        y, _, _, s1, s2 = self.network(x0.detach())
        local = species[:n_local]
        delta1, _ = self.network.gradient_factors(s1, s2, self.scales(local).to(y.dtype).unsqueeze(1))
        return self.energies(y, local).detach(), edge_gradient(x0, edge, self.network.input_gradient(delta1))


class Deployed(nn.Module):
    """The interface of a model file.

    Arguments of every evaluation: species int64 [n_local + n_ghost] (indices into metadata's ``elements``),
    edge_index int64 [2, P] (row 0 the centre i < n_local, row 1 the neighbour), edge_vector [P, 3] = x_j - x_i in Å,
    n_local. Energies in eV (float64). Besides what this class names, a file has ``forces`` and one of

    - ``atomic_uncertainties(phi [n_local, p])`` -> u_i [n_local]: of each atom's own features;
    - ``force_uncertainties(forces [n, 3, p])`` -> u_i [n]: column m of phi is then the atomic energy of member m of an
      ensemble (up to a constant), and ``forces`` are the members' forces.
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
        return self.structure_uncertainty(phi_mean.unsqueeze(0)).squeeze(0)

    @torch.jit.export
    def metadata(self) -> str:
        """The JSON record of the file."""
        return self.description


class DeployedModel(Deployed):
    """One network with sketched gradient features phi (in its precision)."""

    def __init__(
        self,
        model: GaussianMomentNetwork,
        sketch: GradientSketch | LastLayerSketch,
        metadata: str = "{}",
        kind: str = "posterior",
    ) -> None:
        super().__init__(sketch.projections, metadata)
        self.potential = Potential(model)
        self.sketch = sketch
        uncertainty = DistanceUncertainty if kind == "distance" else PosteriorUncertainty
        self.structure_uncertainty = uncertainty(sketch.projections)
        self.atom_uncertainty = uncertainty(sketch.projections)

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, p]), both attached to the graph of edge_vector."""
        x0 = self.potential.descriptor(species, edge_index, edge_vector, n_local)
        y, x1, x2, s1, s2 = self.potential.network(x0)
        delta3 = self.potential.scales(species[:n_local]).to(y.dtype).unsqueeze(1)
        return self.potential.energies(y, species[:n_local]), self.features(x0, x1, x2, s1, s2, delta3)

    def features(self, x0: Tensor, x1: Tensor, x2: Tensor, s1: Tensor, s2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the layers' inputs, the activation slopes and delta^3 = c sigma_Z [n, 1]."""
        delta1, delta2 = self.potential.network.gradient_factors(s1, s2, delta3)
        return self.sketch(x0, x1, x2, delta1, delta2, delta3)

    @torch.jit.export
    def forces(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], d sum(E)/d edge_vector [P, 3]), detached."""
        return self.potential.energies_and_gradient(species, edge_index, edge_vector, n_local)

    @torch.jit.export
    def atomic_uncertainties(self, phi: Tensor) -> Tensor:
        """Calibrated atomic uncertainties [n_local], eV/Å, of atomic features [n_local, p]."""
        return self.atom_uncertainty(phi)


class LastLayerModel(DeployedModel):
    """The same with features of the last layer only."""

    def features(self, x0: Tensor, x1: Tensor, x2: Tensor, s1: Tensor, s2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the last hidden state and delta^3."""
        return self.sketch(x2, delta3)


class DeployedEnsemble(Deployed):
    """Several networks: energies and forces are their means, uncertainties their spreads.

    phi [n_local, M] (float64) holds the members' atomic energies minus the mean energy shift of the element, so that
    numbers stay small. Its mean over a structure gives the spread of the energies, and the derivatives of its columns
    are the members' forces.
    """

    mean_shift: Tensor

    def __init__(self, models: Sequence[GaussianMomentNetwork], metadata: str = "{}") -> None:
        super().__init__(len(models), metadata)
        potentials = [Potential(model) for model in models]
        self.members: Any = nn.ModuleList(potentials)
        self.structure_uncertainty = EnsembleUncertainty()
        self.atom_uncertainty = ForceSpreadUncertainty()
        self.register_buffer("mean_shift", torch.stack([member.energy_shift for member in potentials]).mean(0))

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, M]), both attached to the graph of edge_vector."""
        columns: list[Tensor] = []
        for member in self.members:
            columns.append(member.atomic_energies(species, edge_index, edge_vector, n_local))
        energies = torch.stack(columns, 1)
        return energies.mean(1), energies - self.mean_shift.index_select(0, species[:n_local]).unsqueeze(1)

    @torch.jit.export
    def forces(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], d sum(E)/d edge_vector [P, 3]), detached."""
        energies: list[Tensor] = []
        gradients: list[Tensor] = []
        for member in self.members:
            energy, gradient = member.energies_and_gradient(species, edge_index, edge_vector, n_local)
            energies.append(energy)
            gradients.append(gradient)
        return torch.stack(energies).mean(0), torch.stack(gradients).mean(0)

    @torch.jit.export
    def force_uncertainties(self, forces: Tensor) -> Tensor:
        """Calibrated atomic uncertainties [n], eV/Å, of the members' forces [n, 3, M]."""
        return self.atom_uncertainty(forces)


def edge_gradient(output: Tensor, edge: Tensor, cotangent: Tensor) -> Tensor:
    """Vector-Jacobian product of ``output`` with respect to ``edge``; zeros where there are no pairs."""
    if edge.size(0) == 0:
        return torch.zeros_like(edge)
    cotangents: list[Tensor | None] = [cotangent]
    gradient = torch.autograd.grad([output], [edge], cotangents)[0]
    assert gradient is not None
    return gradient.detach()
