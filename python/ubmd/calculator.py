"""A model file in Python: an ASE calculator, and an evaluator for many structures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes

from ubmd.crystal.evaluator import NO_STRESS, CrystalEvaluator
from ubmd.data.graph import VOIGT, Batch, Graph, build_graph, chunks, collate, scatter_forces, strain_gradient
from ubmd.errors import ModelError
from ubmd.export import load_model, structure_means
from ubmd.models.evaluation import Evaluation, Prediction, evaluation, is_ensemble

__all__ = ["Calculator", "Evaluator", "Prediction"]


class Evaluator:
    """Energies, forces, stress and uncertainties of many structures from one model file."""

    def __init__(self, path: Path | str, precision: str = "mixed") -> None:
        self.module = load_model(Path(path), precision)
        self.metadata: dict[str, Any] = json.loads(self.module.metadata())
        self.elements: list[str] = self.metadata["elements"]
        self.cutoff: float = self.metadata["cutoff"]
        self.edge_dtype = torch.float32 if precision == "single" else torch.float64
        self.feature_scale: float = self.metadata["uncertainty"]["energy"]["feature_scale"]
        self.crystal = CrystalEvaluator(self.module, self.metadata) if "lattice" in self.metadata else None
        """what evaluates force-constant potentials"""

    def graph(self, atoms: Atoms) -> Graph:
        """The structure as the graph of a network."""
        return build_graph(atoms, self.elements, self.cutoff)

    def predict(self, structures: Iterable[Atoms]) -> list[Prediction]:
        """One prediction per structure; structures share evaluations of bounded size."""
        if self.crystal is not None:
            with torch.jit.optimized_execution(False):
                return [self.crystal.predict(atoms) for atoms in structures]
        batches = chunks(self.graph(atoms) for atoms in structures)
        return [prediction for batch in batches for prediction in self._predict_batch(batch)]

    def predict_one(self, atoms: Atoms) -> Prediction:
        """Prediction for one structure."""
        return self.predict([atoms])[0]

    def _predict_batch(self, batch: Batch) -> list[Prediction]:
        with torch.jit.optimized_execution(False):
            return self._predictions(batch, self._evaluation(batch))

    def _evaluation(self, pairs: Graph | Batch) -> Evaluation:
        return evaluation(self.module, pairs, pairs.edge_vector.to(self.edge_dtype))

    def _predictions(self, batch: Batch, result: Evaluation) -> list[Prediction]:
        means = structure_means(result.phi.double(), batch)
        with torch.no_grad():
            u = [float(self.module.uncertainty(mean)) for mean in means]
        if is_ensemble(self.module):
            # how the members differ: their common energy says nothing about uncertainty
            means = means - means.mean(1, keepdim=True)
        sizes = batch.counts.tolist()
        strain = batch.virials_from(result.gradient).numpy()
        forces = batch.forces_from(result.gradient).split(sizes)
        energies, atomic_u = result.energy.split(sizes), result.atomic_uncertainties().split(sizes)
        return [
            Prediction(
                energy=float(energies[k].sum()),
                forces=forces[k].numpy(),
                stress=strain[k][VOIGT] / volume if volume > 0.0 else None,
                u=u[k],
                atomic_u=atomic_u[k].numpy(),
                feature=means[k].numpy() / self.feature_scale,
            )
            for k, volume in enumerate(batch.volume.tolist())
        ]

    def predict_with_gradient(self, atoms: Atoms) -> tuple[Prediction, np.ndarray, np.ndarray]:
        """Prediction for one structure and, as in ``uncertainty_gradient``, the derivatives of u: one evaluation."""
        if self.crystal is not None:
            with torch.jit.optimized_execution(False):
                return *self.crystal.predict_with_gradient(atoms), np.full((3, 3), np.nan)
        batch = collate([self.graph(atoms)])
        with torch.jit.optimized_execution(False):
            result = self._evaluation(batch)
            (prediction,) = self._predictions(batch, result)
            _, gradient = self._uncertainty_gradient(result)
        return prediction, *_gradients(batch, gradient)

    def uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
        """(u eV/atom, du/dr [n, 3] 1/atom·eV/Å, du/d(strain) [3, 3] eV/atom) of the structure uncertainty.

        The derivatives by strain are NaN for force-constant potentials: they have none.
        """
        if self.crystal is not None:
            prediction, *derivatives = self.predict_with_gradient(atoms)
            return prediction.u, derivatives[0], derivatives[1]
        graph = self.graph(atoms)
        with torch.jit.optimized_execution(False):
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
        """(U eV/Å, dU/dr [n, 3] eV/Å^2, dU/d(strain) [3, 3] eV/Å) of the sum U of the atomic uncertainties."""
        if self.crystal is not None:
            raise ModelError(
                "A force-constant potential has no gradient of atomic uncertainties: use that of the structure's."
            )
        graph = self.graph(atoms)
        with torch.jit.optimized_execution(False):
            total, gradient = self._evaluation(graph).atomic_uncertainty_gradient()
        return float(total), *_gradients(graph, gradient)


def _gradients(pairs: Graph | Batch, edge_gradient: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives with respect to positions [n, 3] and strain [3, 3] from those with respect to edge vectors [P, 3]."""
    owner = torch.zeros(len(edge_gradient), dtype=torch.int64)
    strain = strain_gradient(pairs.edge_vector, edge_gradient, owner, 1)[0]
    return -scatter_forces(pairs.edge_index, edge_gradient, len(pairs.species)).numpy(), strain.numpy()


class Calculator(AseCalculator):
    """ASE calculator of a ubmd model file.

    Besides energy (eV), forces (eV/Å) and stress (eV/Å^3) its results hold ``uncertainty`` (structure, eV/atom),
    ``atomic_uncertainties`` ([n], eV/Å) and, from :meth:`get_bias_forces`, the raw uncertainty forces. With
    ``bias_force`` = f > 0 energies and forces are those of E - f·u (a fixed scale: LAMMPS's fix ubmd adapts it).

    Raises:
        ModelError: missing or corrupt model file. DataError: an element that the model does not know; for a
            force-constant potential a box that doesn't hold its crystal, or an atom too far from its site.
    """

    implemented_properties: ClassVar[list[str]] = [  # type: ignore[misc]
        "energy",
        "free_energy",
        "forces",
        "stress",
        "uncertainty",
        "atomic_uncertainties",
    ]

    def __init__(self, path: Path | str, precision: str = "double", bias_force: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.evaluator = Evaluator(path, precision)
        self.bias_force = bias_force

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        if self.bias_force:
            prediction, gradient, strain = self.evaluator.predict_with_gradient(self.atoms)
        else:
            prediction = self.evaluator.predict_one(self.atoms)
        energy, forces, stress = prediction.energy, prediction.forces, prediction.stress
        if self.bias_force:
            energy -= self.bias_force * prediction.u
            forces = forces + self.bias_force * gradient
            if self.evaluator.crystal is not None:
                stress = None
            elif stress is not None:
                stress = stress - self.bias_force * strain[VOIGT] / self.atoms.get_volume()
        if stress is None and "stress" in properties:
            crystal = self.evaluator.crystal is not None
            raise PropertyNotImplementedError(NO_STRESS if crystal else "Stress needs a three-dimensional cell.")
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": forces,
            "uncertainty": prediction.u,
            "atomic_uncertainties": prediction.atomic_u,
        }
        if stress is not None:
            self.results["stress"] = stress

    def get_bias_forces(self, atoms: Atoms) -> np.ndarray:
        """Raw uncertainty forces du/dr [n, 3] (they drive the uncertainty up), eV/Å per atom."""
        return self.evaluator.uncertainty_gradient(atoms)[1]
