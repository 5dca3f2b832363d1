"""A model file in Python: an ASE calculator, and an evaluator for many structures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes

from ubmd.data.graph import VOIGT
from ubmd.data.periodicity import stress_within
from ubmd.devices import CPU, check_device, torch_device
from ubmd.errors import ArgumentError, ModelError
from ubmd.operators import available
from ubmd.potentials.file import load_with_record
from ubmd.potentials.force_constants.evaluator import NO_STRESS
from ubmd.potentials.interface import Prediction
from ubmd.potentials.kinds import kind_of_record
from ubmd.potentials.record import complete_record, precision_for
from ubmd.spelling import nearest

__all__ = ["Calculator", "Model", "Prediction"]

_ASE_KEYWORDS = ("atoms", "label", "directory")  # of ASE's base class, those that have a meaning here


class Model:
    """A model file, loaded: energies, forces, stress and uncertainties of many structures, whatever kind it is of.

    >>> import ubmd
    >>> model = ubmd.Model("copper/model.pt")
    >>> model.elements, model.cutoff
    (['Cu'], 5.0)

    It can be pickled and copied. A pickle holds the model itself, so that it works where the file is not.

    Args:
        path: the file.
        precision: 'mixed' (network in float32, sums in float64; the default), 'double' or 'single', as for
            ``pair_style ubmd``. Some modules run in one precision only, which then is the default.
        device: 'cpu', 'cuda' (the first GPU) or 'cuda:n'. Force-constant potentials run on the CPU only.

    Raises:
        ModelError: the file is missing or corrupt, or cannot run in this precision or on this device.
        SettingsError: torch has no such device.
    """

    def __init__(self, path: Path | str, precision: str | None = None, device: str = CPU) -> None:
        self.path = Path(path)
        check_device(device, "device")
        precision = precision or precision_for(Path(path), "mixed")
        module, record = load_with_record(Path(path), precision, device)
        with complete_record(Path(path)):
            self._take(module, record, precision, device)

    def _take(self, module: Any, metadata: dict[str, Any], precision: str, device: str) -> None:
        """Evaluate a module that has been loaded in this precision, onto this device."""
        self.module = module
        self.metadata = metadata
        self.elements: list[str] = metadata["elements"]
        self.cutoff: float = metadata["cutoff"]
        self._precision = precision
        self._device = device
        self._kind = kind_of_record(metadata).make_evaluator(module, metadata, precision, device)

    def __getstate__(self) -> dict[str, Any]:
        """The module as it is in memory: its file may have changed since."""
        buffer = io.BytesIO()
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # as in `load_model`
            torch.jit.save(self.module, buffer)
        kept = {"metadata": self.metadata, "precision": self._precision, "device": self._device, "path": self.path}
        return {"module": buffer.getvalue(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Inverse of `__getstate__`.

        Raises:
            ModelError: the model needs the compiled operators, which can't be loaded here.
            SettingsError: torch does not have the device of the model here.
        """
        device = state.get("device", CPU)
        check_device(device, "device")
        operators = available()
        try:
            with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
                module = torch.jit.load(io.BytesIO(state["module"]), map_location=torch_device(device))
        except RuntimeError as error:
            if not operators and "ubmd::" in str(error):
                raise ModelError("The model needs ubmd's compiled operators, which can't be loaded here.") from None
            raise
        self.path = state["path"]
        self._take(module, state["metadata"], state["precision"], device)

    def __repr__(self) -> str:
        return f"Model({str(self.path)!r}): {' '.join(self.elements)}, cutoff {self.cutoff:g} Å"

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

    >>> import ubmd
    >>> from ase.build import bulk
    >>> atoms = bulk("Cu", cubic=True)
    >>> atoms.calc = ubmd.Calculator("copper/model.pt")
    >>> energy, forces = atoms.get_potential_energy(), atoms.get_forces()  # eV, eV/Å
    >>> atoms.calc.results["atomic_uncertainties"].shape  # eV/Å, calibrated
    (4,)

    Stresses of slabs and wires have no components along their free directions.

    Besides energy (eV), forces (eV/Å) and stress (eV/Å^3) its results hold ``uncertainty`` (structure, eV/atom),
    ``atomic_uncertainties`` ([n], eV/Å) and, from :meth:`get_bias_forces`, the raw uncertainty forces. With
    ``bias_force`` = f > 0 energies and forces are those of E - f·u (a fixed scale: LAMMPS's fix ubmd adapts it).
    It can be copied, and pickled with the model in it: for multiprocessing, joblib or dask.

    Keywords besides these are those of ASE's calculators: ``atoms``, ``label``, ``directory``.

    Raises:
        ArgumentError: an unknown keyword (ASE would accept it silently).
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

    def __init__(
        self,
        model: Path | str | Model,
        precision: str | None = None,
        bias_force: float = 0.0,
        device: str = CPU,
        **kwargs: Any,
    ) -> None:
        """``model``: file, or `Model`, which has its own precision and device. ``precision``: by default that of a file
        which runs in one only, else 'double'. ``device``: as of `Model`."""
        _check_keywords(kwargs)
        super().__init__(**kwargs)
        if not isinstance(model, Model):
            model = Model(model, precision or precision_for(Path(model), "double"), device)
        self.evaluator = model
        self.bias_force = bias_force

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """ASE's way to change settings; there are none here that could change after the model is loaded."""
        if kwargs:
            raise ArgumentError(f"ubmd.Calculator cannot change {', '.join(kwargs)}; make a new calculator.")
        return {}

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
                bias = self.bias_force * strain[VOIGT] / self.atoms.get_volume()
                stress = stress - stress_within(bias, self.atoms)
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


def _check_keywords(found: Iterable[str]) -> None:
    """ArgumentError for the first keyword that `Calculator` does not know."""
    known = ("precision", "bias_force", "device", *_ASE_KEYWORDS)
    for name in found:
        if name not in _ASE_KEYWORDS:
            meant = nearest(name, known)
            hint = f"did you mean {meant!r}?" if meant else f"known keywords: path, {', '.join(known)}."
            raise ArgumentError(f"ubmd.Calculator has no keyword {name!r}; {hint}")
