"""The trainable GM-NN potential: descriptor, network and per-element energy scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ubmd.data.graph import Batch, Graph, scatter_forces, strain_gradient
from ubmd.operators import available, use_operators
from ubmd.potentials.baseline import baseline_settings
from ubmd.potentials.gmnn.gaussian_moments import GaussianMoments, count_invariants
from ubmd.potentials.gmnn.network import NeuralTangentNetwork
from ubmd.settings import ModelSettings
from ubmd.settings.potentials import KEYS_OF_GMNN

SIZES = {"light": (5, 7), "paper": (7, 9)}  # named size -> (N_r, N_b)
ARCHITECTURE = {*KEYS_OF_GMNN, "elements"}
"""keys of [model] that the network itself depends on"""
SMALLEST_CONSTANT = 1e-3  # eV: keeps c finite when the regression leaves no residual (a single structure)


class GaussianMomentNetwork(nn.Module):
    """E = sum_i c (sigma_{Z_i} NN(G_i) + mu_{Z_i}), energies in eV.

    With given energies of isolated atoms, which the labels then lack, NN(G_i) - NN(0) takes the place of NN(G_i), and
    mu = 0 is not trained: an atom without neighbours (G = 0) has no energy, as it should.

    The network runs in float32 or float64 (``to_network_dtype``); sigma, mu, c and energy sums are always float64.
    It uses the operator library if that can be loaded (`use_operators` changes this).
    """

    constant: Tensor

    def __init__(self, elements: Sequence[str], settings: ModelSettings, seed: int = 0) -> None:
        super().__init__()
        n_radial, n_basis = SIZES[settings.size]
        self.elements = list(elements)
        self.settings = settings
        self.descriptor = GaussianMoments(
            len(self.elements),
            settings.cutoff,
            settings.n_radial or n_radial,
            settings.n_basis or n_basis,
            settings.r_min,
        )
        self.network = NeuralTangentNetwork(count_invariants(self.descriptor.n_radial), settings.hidden)
        use_operators(self, available())
        self.scale = nn.Parameter(torch.ones(len(self.elements), dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(len(self.elements), dtype=torch.float64))
        self.register_buffer("constant", torch.ones((), dtype=torch.float64))
        self._initialise(torch.Generator().manual_seed(seed))
        self.to_network_dtype(torch.float32)

    def _initialise(self, generator: torch.Generator) -> None:
        """W ~ N(0, 1), b = 0, B ~ U(-1, 1)."""
        with torch.no_grad():
            self.radial.uniform_(-1.0, 1.0, generator=generator)
            for weight, bias in zip(self.weights, self.biases, strict=True):
                weight.normal_(generator=generator)
                bias.zero_()

    @property
    def centred(self) -> bool:
        """Whether an atom without neighbours has no energy."""
        return bool(self.settings.atom_energies)

    def lone_output(self) -> Tensor:
        """NN(0) of an atom without neighbours, float64 (0-dim); to be subtracted in `centred` models only."""
        nothing = torch.zeros(1, self.network.weight1.size(1), dtype=self.radial.dtype, device=self.radial.device)
        y: Tensor = self.network(nothing)[0]
        return y.double().squeeze(0)

    @property
    def cutoff(self) -> float:
        return self.descriptor.cutoff

    @property
    def radial(self) -> nn.Parameter:
        return self.descriptor.radial

    @property
    def weights(self) -> list[nn.Parameter]:
        return [self.network.weight1, self.network.weight2, self.network.weight3]

    @property
    def biases(self) -> list[nn.Parameter]:
        return [self.network.bias1, self.network.bias2, self.network.bias3]

    def to_network_dtype(self, dtype: torch.dtype) -> GaussianMomentNetwork:
        """Run descriptor and network in float32 or float64 (in place)."""
        for parameter in (self.radial, *self.weights, *self.biases):
            parameter.data = parameter.data.to(dtype)
        return self

    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to build the same architecture (weights travel as a state_dict)."""
        architecture = self.settings.model_dump(include=ARCHITECTURE)
        return {"elements": self.elements, "settings": architecture | baseline_settings(self.settings)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GaussianMomentNetwork:
        return cls(config["elements"], ModelSettings.model_validate(config["settings"]))

    def initialise_energies(self, graphs: Sequence[Graph]) -> None:
        """Set mu and c by least squares of total energies on element counts (minimum norm if rank-deficient).

        In a `centred` model mu is 0.
        """
        counts = np.stack([np.bincount(graph.species.numpy(), minlength=len(self.elements)) for graph in graphs])
        energies = np.array([graph.energy for graph in graphs])
        shifts, *_ = np.linalg.lstsq(counts.astype(float), energies, rcond=None)
        shifts = np.zeros_like(shifts) if self.centred else shifts
        residual = (energies - counts @ shifts) / counts.sum(axis=1)
        constant = max(float(np.sqrt(np.mean(residual**2))), SMALLEST_CONSTANT)
        with torch.no_grad():
            self.constant.fill_(constant)
            self.shift.copy_(torch.from_numpy(shifts / constant))
            self.scale.fill_(1.0)

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> Tensor:
        """Atomic energies, float64 [n_local], eV; arguments as in GaussianMoments.forward."""
        y, *_ = self.network(self.descriptor(species, edge_index, edge_vector, n_local))
        return self.atomic_energies(y, species[:n_local])

    def atomic_energies(self, y: Tensor, species: Tensor) -> Tensor:
        """c (sigma y + mu), float64 [n]; y is the network's output, or what it exceeds NN(0) by."""
        y = y.double() - self.lone_output() if self.centred else y.double()
        return self.constant * (self.scale.index_select(0, species) * y + self.shift.index_select(0, species))

    def energy_shifts(self) -> Tensor:
        """What is added to c sigma_Z NN(G), for each element, float64, eV."""
        shift = self.shift - self.scale * self.lone_output() if self.centred else self.shift
        return self.constant * shift

    def energy_forces_virial(self, batch: Batch, create_graph: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Energies [S] eV, forces [N, 3] eV/Å and dE/d(strain) = V·stress [S, 3, 3] eV of a batch, all float64.

        With ``create_graph`` the results can be differentiated with respect to the parameters (training).
        """
        n = len(batch.species)
        with torch.enable_grad():
            edge_vector = batch.edge_vector.detach().requires_grad_(True)
            invariants = self.descriptor(batch.species, batch.edge_index, edge_vector, n)
            y, _, _, s1, s2 = self.network(invariants)
            # dE/dG in closed form: one backward pass through the descriptor is all that autograd has to do.
            delta3 = (self.constant * self.scale).index_select(0, batch.species).to(y.dtype).unsqueeze(1)
            delta1, _ = self.network.gradient_factors(s1, s2, delta3)
            if len(edge_vector):
                (gradient,) = torch.autograd.grad(
                    invariants, edge_vector, self.network.input_gradient(delta1), create_graph=create_graph
                )
            else:
                gradient = torch.zeros_like(edge_vector)
            atomic = self.atomic_energies(y, batch.species)
        energies = atomic.new_zeros(batch.n_structures).index_add(0, batch.structure, atomic)
        forces = scatter_forces(batch.edge_index, gradient, n)
        owner = batch.structure.index_select(0, batch.edge_index[0])
        virial = strain_gradient(batch.edge_vector, gradient, owner, batch.n_structures)
        return energies, forces, virial
