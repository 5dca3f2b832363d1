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
from ubmd.data.graph import VOIGT
from ubmd.export import load_model
from ubmd.models.evaluation import Prediction
from ubmd.models.evaluator import NetworkEvaluator

__all__ = ["Calculator", "Evaluator", "Prediction"]


class Evaluator:
    """Energies, forces, stress and uncertainties of many structures from one model file, of whatever kind."""

    def __init__(self, path: Path | str, precision: str = "mixed") -> None:
        self.module = load_model(Path(path), precision)
        self.metadata: dict[str, Any] = json.loads(self.module.metadata())
        self.elements: list[str] = self.metadata["elements"]
        self.cutoff: float = self.metadata["cutoff"]
        self._kind: CrystalEvaluator | NetworkEvaluator = (
            CrystalEvaluator(self.module, self.metadata)
            if "lattice" in self.metadata
            else NetworkEvaluator(self.module, self.metadata, precision)
        )

    def predict(self, structures: Iterable[Atoms]) -> list[Prediction]:
        """One prediction per structure."""
        with torch.jit.optimized_execution(False):
            return self._kind.predict(structures)

    def predict_one(self, atoms: Atoms) -> Prediction:
        """Prediction for one structure."""
        return self.predict([atoms])[0]

    def predict_with_gradient(self, atoms: Atoms) -> tuple[Prediction, np.ndarray, np.ndarray | None]:
        """Prediction for one structure and, as in ``uncertainty_gradient``, the derivatives of u."""
        with torch.jit.optimized_execution(False):
            return self._kind.predict_with_gradient(atoms)

    def uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray | None]:
        """(u eV/atom, du/dr [n, 3] 1/atom·eV/Å, du/d(strain) [3, 3] eV/atom) of the structure uncertainty.

        The derivatives by strain are None for force-constant potentials: they have none.
        """
        with torch.jit.optimized_execution(False):
            return self._kind.uncertainty_gradient(atoms)

    def atomic_uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
        """(U eV/Å, dU/dr [n, 3] eV/Å^2, dU/d(strain) [3, 3] eV/Å) of the sum U of the atomic uncertainties.

        Raises:
            ModelError: a force-constant potential, which has no such gradient.
        """
        with torch.jit.optimized_execution(False):
            return self._kind.atomic_uncertainty_gradient(atoms)


class Calculator(AseCalculator):
    """ASE calculator of a ubmd model file.

    Besides energy (eV), forces (eV/Å) and stress (eV/Å^3) its results hold ``uncertainty`` (structure, eV/atom),
    ``atomic_uncertainties`` ([n], eV/Å) and, from :meth:`get_bias_forces`, the raw uncertainty forces. With
    ``bias_force`` = f > 0 energies and forces are those of E - f·u (a fixed scale: LAMMPS's fix ubmd adapts it).

    Raises:
        ModelError: missing or corrupt model file. DataError: an element that the model does not know, two atoms at the
            same place, a cell whose periodic vectors are parallel; for a force-constant potential a box that doesn't
            hold its crystal, or an atom too far from its site.
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
            if strain is None:
                stress = None
            elif stress is not None:
                stress = stress - self.bias_force * strain[VOIGT] / self.atoms.get_volume()
        if stress is None and "stress" in properties:
            fixed = self.bias_force and strain is None
            raise PropertyNotImplementedError(NO_STRESS if fixed else "Stress needs a three-dimensional cell.")
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
