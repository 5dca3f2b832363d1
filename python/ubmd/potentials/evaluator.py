"""Model files of networks in Python: structures as graphs, many in one evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ubmd.data.graph import (
    VOIGT,
    Batch,
    Graph,
    build_graph,
    chunks,
    collate,
    scatter_forces,
    strain_gradient,
    structure_means,
)
from ubmd.devices import CPU, torch_device
from ubmd.errors import DataError
from ubmd.potentials.evaluation import Evaluation, evaluation, is_ensemble, structure_uncertainties
from ubmd.potentials.file import load_with_record
from ubmd.potentials.interface import Prediction
from ubmd.potentials.record import complete_record


def load_network(path: Path, precision: str, device: str = CPU) -> NetworkEvaluator:
    """The evaluator of a network's model file; see `load_with_record` for the errors."""
    module, record = load_with_record(path, precision, device)
    with complete_record(path):
        return NetworkEvaluator(module, record, precision, device)


class NetworkEvaluator:
    """Predictions of a network's module (any with a model file's interface), which is on ``device``."""

    def __init__(self, module: Any, metadata: dict[str, Any], precision: str, device: str = CPU) -> None:
        self.module = module
        self.device = torch_device(device)
        self.elements: list[str] = metadata["elements"]
        self.cutoff: float = metadata["cutoff"]
        self.edge_dtype = torch.float32 if precision == "single" else torch.float64
        self.feature_scale: float = metadata["uncertainty"]["energy"]["feature_scale"]
        scale = metadata.get("atom_scale")
        self.atom_scale = None if scale is None else torch.tensor(scale, dtype=torch.float64).to(self.device)

    def graph(self, atoms: Atoms) -> Graph:
        """The structure as the graph of a network, on the CPU."""
        return build_graph(atoms, self.elements, self.cutoff)

    def predict(self, structures: Iterable[Atoms]) -> list[Prediction]:
        """See `Model`; structures share evaluations of bounded size."""
        batches = chunks(self._graphs(list(structures)), device=self.device)
        return [prediction for batch in batches for prediction in self._predictions(batch, self._evaluation(batch))]

    def _graphs(self, structures: Sequence[Atoms]) -> Iterator[Graph]:
        """Graphs of structures; an error says which of several it is."""
        for number, atoms in enumerate(structures):
            try:
                yield self.graph(atoms)
            except DataError as error:
                raise DataError(f"structure {number}: {error}" if len(structures) > 1 else str(error)) from None

    def _evaluation(self, pairs: Graph | Batch) -> Evaluation:
        return evaluation(self.module, pairs, pairs.edge_vector.to(self.edge_dtype), self.atom_scale)

    def _predictions(self, batch: Batch, result: Evaluation) -> list[Prediction]:
        means = structure_means(result.phi.double(), batch)
        u = structure_uncertainties(self.module, means).tolist()
        if is_ensemble(self.module):
            # how the members differ: their common energy says nothing about uncertainty
            means = means - means.mean(1, keepdim=True)
        ends = np.cumsum(batch.counts.cpu().numpy())[:-1]
        virial = batch.stress_within(batch.virials_from(result.gradient)[:, VOIGT[0], VOIGT[1]]).cpu().numpy()
        energies = np.add.reduceat(result.energy.cpu().numpy(), [0, *ends])
        forces = np.split(batch.forces_from(result.gradient).cpu().numpy(), ends)
        atomic_u = np.split(result.atomic_uncertainties().cpu().numpy(), ends)
        features = means.cpu().numpy() / self.feature_scale
        return [
            Prediction(
                energy=float(energies[k]),
                forces=forces[k],
                stress=virial[k] / volume if volume > 0.0 else None,
                u=u[k],
                atomic_u=atomic_u[k],
                feature=features[k],
            )
            for k, volume in enumerate(batch.volume.tolist())
        ]

    def predict_with_gradient(self, atoms: Atoms) -> tuple[Prediction, np.ndarray, np.ndarray]:
        """See `Model`; both from one evaluation."""
        batch = collate([self.graph(atoms)]).to(self.device)
        result = self._evaluation(batch)
        (prediction,) = self._predictions(batch, result)
        _, gradient = self._uncertainty_gradient(result)
        return prediction, *_gradients(batch, gradient)

    def uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
        """See `Model`."""
        graph = self.graph(atoms).to(self.device)
        u, gradient = self._uncertainty_gradient(self._evaluation(graph))
        return u, *_gradients(graph, gradient)

    def _uncertainty_gradient(self, result: Evaluation) -> tuple[float, torch.Tensor]:
        """u and its gradient with respect to the edge vectors [P, 3] of one structure.

        Phase 1 gives phi and w = du/d(mean phi), phase 2 the vector-Jacobian product with w/n.
        """
        mean = result.phi.double().mean(0).requires_grad_(True)
        u = self.module.uncertainty(mean)
        (w,) = torch.autograd.grad(u, mean)
        return float(u.detach()), result.feature_gradient(w / result.n_atoms)

    def atomic_uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
        """See `Model`."""
        graph = self.graph(atoms).to(self.device)
        total, gradient = self._evaluation(graph).atomic_uncertainty_gradient()
        return float(total), *_gradients(graph, gradient)


def _gradients(pairs: Graph | Batch, edge_gradient: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives with respect to positions [n, 3] and strain [3, 3] from those with respect to edge vectors [P, 3]."""
    owner = torch.zeros_like(pairs.edge_index[0])
    strain = strain_gradient(pairs.edge_vector, edge_gradient, owner, 1)[0]
    forces = scatter_forces(pairs.edge_index, edge_gradient, len(pairs.species))
    return -forces.cpu().numpy(), strain.cpu().numpy()
