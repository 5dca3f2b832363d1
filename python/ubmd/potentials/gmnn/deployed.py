"""The model as LAMMPS sees it: one TorchScript module with networks, features, uncertainty and metadata.

Rule of precision: *parameters* follow the precision that the user of the file asks for (mixed and single: float32,
double: float64); *buffers* (energy shifts, the structures' posterior factor, calibration) stay float64.
"""

import copy
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from ubmd.operators import use_operators
from ubmd.potentials.deployed import Deployed, edge_gradient
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.network import Layers
from ubmd.potentials.gmnn.sketch import GradientSketch, LastLayerSketch
from ubmd.uncertainty import DistanceUncertainty, EnsembleUncertainty, ForceSpreadUncertainty, PosteriorUncertainty


class ScaledNetwork(nn.Module):
    """One trained network and its energy scales."""

    operators: Final[bool]
    n_layers: Final[int]
    """tensors of a tape that are the network's layers; the descriptor's state comes after them"""
    energy_scale: Tensor
    energy_shift: Tensor

    def __init__(self, model: GaussianMomentNetwork) -> None:
        super().__init__()
        # a twin that shares its parameters with the model, but not whether it uses the operators
        self.descriptor = copy.copy(model.descriptor)
        self.network = model.network.folded()
        self.operators = False
        self.n_layers = len(Layers._fields) - 1
        use_operators(self, False)
        self.register_buffer("energy_scale", (model.constant * model.scale).detach().clone())
        self.register_buffer("energy_shift", model.energy_shifts().detach().clone())

    def scales(self, species: Tensor) -> Tensor:
        """c sigma_Z of atoms [n], eV."""
        return self.energy_scale.index_select(0, species)

    def energies(self, y: Tensor, species: Tensor) -> Tensor:
        """Energies [n] (float64, eV) from the network's output [n]."""
        return torch.addcmul(self.energy_shift.index_select(0, species), self.scales(species), y)

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

    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As in `Deployed`; the tape is that of `layers` and the descriptor's state."""
        x0, state = self.descriptor.evaluate(species, first, neighbours, edge_vector)
        delta3 = self.scales(species).to(x0.dtype).unsqueeze(1)
        if keep:
            y, slope, layers, z2 = self.network.evaluate_for_bias(x0, delta3)
            return self.energies(y, species), self.descriptor.vjp(state, slope), self.tape(layers, z2) + state
        y, slope = self.network.energies(x0, delta3)
        empty: list[Tensor] = []
        return self.energies(y, species), self.descriptor.vjp(state, slope), empty

    def tape(self, kept: Layers, z2: Tensor) -> list[Tensor]:
        """Layers of `evaluate_for_bias` as a list: the tapes of model files are lists of tensors."""
        return [
            kept.x0,
            kept.x1,
            kept.x2,
            kept.s1,
            z2,
            kept.delta1,
            kept.delta2,
            kept.delta3,
            kept.curvature1,
        ]

    def layers(self, tape: list[Tensor]) -> Layers:
        """And back, from the beginning of a tape."""
        x0, x1, x2, s1, z2, delta1, delta2, delta3, curvature1 = tape[: self.n_layers]
        none = z2.new_empty(0)
        return Layers(x0, x1, x2, s1, none, delta1, delta2, delta3, curvature1, none)

    def all_layers(self, tape: list[Tensor]) -> Layers:
        """The same with slopes and curvatures of the second layer, which z2 gives without a product."""
        return self.network.with_second_layer(self.layers(tape), tape[4])

    def trimmed(self, tape: list[Tensor], inputs: bool) -> list[Tensor]:
        """A tape without the layers' inputs x and delta (``inputs``: with those of the hidden layers), for tangents."""
        x0, x1, x2, s1, z2, delta1, delta2, delta3, curvature1 = tape[: self.n_layers]
        none = x2.new_empty(0)
        kept = [x0, x1, none, s1, z2, delta1, delta2] if inputs else [none, none, none, s1, z2, none, none]
        kept.extend([delta3, curvature1])
        kept.extend(tape[self.n_layers :])
        return kept

    def vjp(self, tape: list[Tensor], cotangent: Tensor) -> Tensor:
        """d(sum cotangent·G)/d edge_vector [P, 3] (float64) at the evaluation of a tape."""
        return self.descriptor.vjp(tape[self.n_layers :], cotangent)

    def second_derivative(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, direction: Tensor
    ) -> Tensor:
        """d(direction · d sum(E)/d edge_vector)/d edge_vector [P, 3] (float64) for a direction [P, 3]."""
        if self.operators and edge_vector.is_cpu:
            return self._second_derivative(species, first, neighbours, edge_vector, direction)
        if edge_vector.size(0) == 0:
            return torch.zeros_like(edge_vector, dtype=torch.float64)
        gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        edge = edge_vector.detach().requires_grad_(True)
        x0 = self.descriptor.attached(species, first, neighbours, edge)
        energy = self.energies(self.network(x0)[0], species).sum()
        gradient = torch.autograd.grad([energy], [edge], create_graph=True)[0]
        assert gradient is not None
        torch.set_grad_enabled(gradients)
        return edge_gradient(gradient, edge, direction.to(gradient.dtype)).to(torch.float64)

    def _second_derivative(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, direction: Tensor
    ) -> Tensor:
        """The same in closed form: a tangent pass along the direction, and one reverse pass."""
        x0, state = self.descriptor.evaluate(species, first, neighbours, edge_vector)
        _, slope, layers = self.network.evaluate(x0, self.scales(species).to(x0.dtype).unsqueeze(1))
        xdot0, change = self.descriptor.jvp(state, direction)
        cotangent = self.network.input_tangent(layers, xdot0)
        return self.descriptor.second_vjp(state, direction, change, cotangent, slope)


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
        self.potential = ScaledNetwork(model)
        self.sketch: Any = sketch
        self.structure_uncertainty, self.atom_uncertainty = (
            DistanceUncertainty(sketch.projections)
            if kind == "distance"
            else PosteriorUncertainty(sketch.projections, many=atoms)
            for atoms in (False, True)
        )

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], phi [n_local, p]), both attached to the graph of edge_vector."""
        x0 = self.potential.descriptor(species, edge_index, edge_vector, n_local)
        y, x1, x2, s1, s2 = self.potential.network(x0)
        delta3 = self.potential.scales(species[:n_local]).to(y.dtype).unsqueeze(1)
        return self.potential.energies(y, species[:n_local]), self.sketched(x0, x1, x2, s1, s2, delta3)

    def sketched(self, x0: Tensor, x1: Tensor, x2: Tensor, s1: Tensor, s2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the layers' inputs, the activation slopes and delta^3 = c sigma_Z [n, 1]."""
        delta1, delta2 = self.potential.network.gradient_factors(s1, s2, delta3)
        phi: Tensor = self.sketch(x0, x1, x2, delta1, delta2, delta3)
        return phi

    @torch.jit.export
    def forces(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """(E [n_local], d sum(E)/d edge_vector [P, 3]), detached."""
        return self.potential.energies_and_gradient(species, edge_index, edge_vector, n_local)

    @torch.jit.export
    def atomic_uncertainties(self, phi: Tensor) -> Tensor:
        """Calibrated atomic uncertainties [n_local], eV/Å, of atomic features [n_local, p]."""
        u: Tensor = self.atom_uncertainty(phi)
        return u

    @torch.jit.export
    def uncertainties(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """``uncertainty`` u [R] (eV/atom) of several structures' mean features [R, p], and du/d(mean) [R, p]."""
        with torch.no_grad():
            # never a single row, whose products may end in other digits
            rows = torch.cat([means, means[:1]])
            found: tuple[Tensor, Tensor] = self.structure_uncertainty.with_gradient(rows)
            return found[0][:-1], found[1][:-1]

    @torch.jit.export
    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Energies [n], their gradient [P, 3] and the tape (see `Deployed`)."""
        with torch.no_grad():
            return self.potential.evaluate(species, first, neighbours, edge_vector, keep)

    @torch.jit.export
    def by_structure(self, n: int) -> bool:
        """Whether n atoms cost fewer multiply-adds by structure than atom by atom (`GradientSketch.by_structure`)."""
        cheaper: bool = self.sketch.by_structure(n)
        return cheaper

    @torch.jit.export
    def features(self, tape: list[Tensor], by_structure: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(sums, phi, factors) of an evaluation that kept its tape (see `Deployed`)."""
        with torch.no_grad():
            found: tuple[list[Tensor], Tensor, list[Tensor]] = self.sketch.features(
                self.potential.layers(tape), by_structure
            )
            return found

    @torch.jit.export
    def feature_sum(self, sums: list[Tensor]) -> Tensor:
        """Sum of the raw features over all atoms [p] (float64) from the sums of all chunks."""
        with torch.no_grad():
            total: Tensor = self.sketch.feature_sum(sums)
            return total

    @torch.jit.export
    def directions(self, w: Tensor, by_structure: bool) -> list[Tensor]:
        """What ``feature_gradient`` needs of w [p]."""
        with torch.no_grad():
            found: list[Tensor] = self.sketch.directions(w, by_structure)
            return found

    @torch.jit.export
    def feature_gradient(
        self, tape: list[Tensor], factors: list[Tensor], directions: list[Tensor], w: Tensor
    ) -> Tensor:
        """d(sum_i w·phi_i)/d edge_vector [P, 3] (float64)."""
        with torch.no_grad():
            layers = self.potential.all_layers(tape)
            if self.sketch.operators and len(factors) > 0 and layers.s1.is_cpu:
                weight1, weight2 = self.potential.network.weight1, self.potential.network.weight2
                slope: Tensor = self.sketch.gradient(layers, factors, directions, w, weight1, weight2)
            else:
                zdot1, base2, top, base1, base0 = self.sketch.tangents(layers, factors, directions, w)
                slope = self.potential.network.tangent(layers, zdot1, base2, top, base1, base0)
            return self.potential.vjp(tape, slope)

    @torch.jit.export
    def kept_for_bias(self, tape: list[Tensor], by_structure: bool) -> list[Tensor]:
        """The tape after ``features``, with empty tensors in place of what ``feature_gradient`` doesn't need."""
        return self.potential.trimmed(tape, by_structure)


class LastLayerModel(DeployedModel):
    """The same with features of the last layer only."""

    def sketched(self, x0: Tensor, x1: Tensor, x2: Tensor, s1: Tensor, s2: Tensor, delta3: Tensor) -> Tensor:
        """phi [n, p] from the last hidden state and delta^3."""
        phi: Tensor = self.sketch(x2, delta3)
        return phi

    @torch.jit.export
    def feature_gradient(
        self, tape: list[Tensor], factors: list[Tensor], directions: list[Tensor], w: Tensor
    ) -> Tensor:
        """d(sum_i w·phi_i)/d edge_vector [P, 3] (float64)."""
        with torch.no_grad():
            layers = self.potential.all_layers(tape)
            network = self.potential.network
            # A gradient like that of the energy, with another derivative with respect to x2.
            zbar2 = layers.s2 * self.sketch.last_gradient(layers.delta3, directions, w)
            zbar1 = network.product(zbar2, network.weight2).mul_(layers.s1)
            return self.potential.vjp(tape, network.product(zbar1, network.weight1))


class DeployedEnsemble(Deployed):
    """Several networks: energies and forces are their means, uncertainties their spreads.

    phi [n_local, M] (float64) holds the members' atomic energies minus the mean energy shift of the element, so that
    numbers stay small. Its mean over a structure gives the spread of the energies, and the derivatives of its columns
    are the members' forces.
    """

    mean_shift: Tensor

    def __init__(self, models: Sequence[GaussianMomentNetwork], metadata: str = "{}") -> None:
        super().__init__(len(models), metadata)
        potentials = [ScaledNetwork(model) for model in models]
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
        return energies.mean(1), self.deviations(energies, species[:n_local])

    def deviations(self, energies: Tensor, species: Tensor) -> Tensor:
        """phi [n, M] from the members' energies [n, M]."""
        return energies - self.mean_shift.index_select(0, species).unsqueeze(1)

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
        u: Tensor = self.atom_uncertainty(forces)
        return u

    @torch.jit.export
    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mean energies [n], their gradient [P, 3] and the tape: phi [n, M] and the members' gradients [M, P, 3]."""
        energies: list[Tensor] = []
        gradients: list[Tensor] = []
        with torch.no_grad():
            for member in self.members:
                energy, gradient, _ = member.evaluate(species, first, neighbours, edge_vector, False)
                energies.append(energy)
                gradients.append(gradient)
            energy, gradient = torch.stack(energies, 1), torch.stack(gradients)
            tape = [self.deviations(energy, species), gradient] if keep else gradients[:0]
            return energy.mean(1), gradient.mean(0), tape

    @torch.jit.export
    def by_structure(self, n: int) -> bool:
        """Never: the members' gradients are there for every atom."""
        return False

    @torch.jit.export
    def features(self, tape: list[Tensor], by_structure: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """(sums, phi, factors) of an evaluation that kept its tape (see `Deployed`)."""
        factors: list[Tensor] = []
        return [tape[0].sum(0)], tape[0], factors

    @torch.jit.export
    def feature_sum(self, sums: list[Tensor]) -> Tensor:
        """Sum of phi over all atoms [M] (float64)."""
        return sums[0]

    @torch.jit.export
    def directions(self, w: Tensor, by_structure: bool) -> list[Tensor]:
        """What ``feature_gradient`` needs of w [M]."""
        return [w]

    @torch.jit.export
    def feature_gradient(
        self, tape: list[Tensor], factors: list[Tensor], directions: list[Tensor], w: Tensor
    ) -> Tensor:
        """sum_m w_m gradient_m [P, 3] (float64) for w [M]; different weights for different atoms have no use here."""
        gradient: Tensor = torch.tensordot(w.to(torch.float64), tape[1], dims=([0], [0]))
        return gradient

    @torch.jit.export
    def member_gradients(self, tape: list[Tensor]) -> Tensor:
        """d sum(E_m)/d edge_vector [M, P, 3] (float64)."""
        return tape[1]

    @torch.jit.export
    def member_bias(
        self, species: Tensor, first: Tensor, neighbours: Tensor, edge_vector: Tensor, cotangents: Tensor
    ) -> Tensor:
        """d(sum_m cotangents_m·gradient_m)/d edge_vector [P, 3] (float64) for cotangents [M, P, 3]."""
        total = torch.zeros_like(edge_vector, dtype=torch.float64)
        with torch.no_grad():
            for m, member in enumerate(self.members):
                total += member.second_derivative(species, first, neighbours, edge_vector, cotangents[m])
        return total
