"""A back end of a stranger: energies linear in a few radial symmetry functions. Nothing in ubmd knows it.

It is named by import path, ``model.kind = "linear_backend:Linear"``, and is what every back end has to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import Tensor, nn

from ubmd.data.graph import build_graph
from ubmd.potentials.interface import Labels, RawModule, Report, TrainingTable
from ubmd.settings import UncertaintySettings

CUTOFF = 4.0  # Å


class Module(nn.Module):
    """E_i = w·phi_i; phi_i holds 1 and sums of Gaussians over the neighbours, for each element of the centre."""

    def __init__(self, n_elements: int, centres: list[float], weights: Tensor) -> None:
        super().__init__()
        self.n_elements = n_elements
        self.register_buffer("centres", torch.tensor(centres, dtype=torch.float64))
        self.weights = nn.Parameter(weights)

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """Energies [n_local] and features [n_local, p]."""
        r = edge_vector.to(torch.float64).square().sum(1).add(1e-30).sqrt()
        envelope = 0.5 * torch.cos(r.clamp(max=4.0) * (3.141592653589793 / 4.0)) + 0.5
        pairs = torch.exp(-4.0 * (r.unsqueeze(1) - self.centres).square()) * envelope.unsqueeze(1)
        sums = torch.zeros(n_local, pairs.size(1), dtype=torch.float64).index_add(0, edge_index[0], pairs)
        own = torch.cat([torch.ones(n_local, 1, dtype=torch.float64), sums], 1)
        kind = torch.nn.functional.one_hot(species[:n_local], self.n_elements).to(torch.float64)
        phi = (kind.unsqueeze(2) * own.unsqueeze(1)).flatten(1)
        return phi @ self.weights, phi


class Linear:
    """Least squares on energies and forces; all at once, so that its only epoch is the last."""

    name = "linear"
    checkpoint = "linear.pt"
    uncertainties = ("posterior", "distance")

    def train(
        self, labels: Labels, table: TrainingTable, folder: Path, start: Path | None, seed: int, report: Report | None
    ) -> Path:
        """Solve for the weights."""
        structures = [*labels.training, *labels.validation]
        elements = sorted({symbol for atoms in structures for symbol in atoms.symbols})
        centres = np.linspace(1.5, 3.5, table.model.arguments.get("functions", 4)).tolist()
        width = len(elements) * (1 + len(centres))
        module = Module(len(elements), centres, torch.zeros(width, dtype=torch.float64))
        rows, values = zip(*(equations(module, atoms, elements) for atoms in labels.training), strict=True)
        matrix, target = torch.cat(rows), torch.cat(values)
        square = matrix.T @ matrix + 1e-6 * torch.eye(width, dtype=torch.float64)
        weights = torch.linalg.solve(square, matrix.T @ target)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.checkpoint
        torch.save({"elements": elements, "centres": centres, "weights": weights}, path)
        if report is not None:
            report({"epoch": 1, "epochs": 1})
        return path

    def raw_module(self, checkpoints: Sequence[Path], features: UncertaintySettings) -> RawModule:
        """The module as a TorchScript file, as one from another Python would come."""
        (path,) = checkpoints
        found = torch.load(path, weights_only=True)
        file = path.with_name("raw.pt")
        torch.jit.script(Module(len(found["elements"]), found["centres"], found["weights"])).save(str(file))
        return RawModule(
            file, found["elements"], CUTOFF, len(found["weights"]), record={"functions": len(found["centres"])}
        )


def equations(module: Module, atoms: Atoms, elements: list[str]) -> tuple[Tensor, Tensor]:
    """Rows [1 + 3n, p] and values of the energy and the forces of a structure."""
    graph = build_graph(atoms, elements, CUTOFF)
    arguments = graph.species, graph.edge_index

    def features(edge: Tensor) -> Tensor:
        return module(*arguments, edge, len(atoms))[1].sum(0)

    slopes = torch.autograd.functional.jacobian(features, graph.edge_vector)  # [p, P, 3]
    forces = torch.zeros(slopes.size(0), len(atoms), 3, dtype=torch.float64)
    forces.index_add_(1, graph.edge_index[0], slopes).index_add_(1, graph.edge_index[1], -slopes)
    energy = features(graph.edge_vector).unsqueeze(0)
    values = torch.cat([torch.tensor([graph.energy], dtype=torch.float64), graph.forces.flatten()])
    return torch.cat([energy, forces.flatten(1).T]), values
