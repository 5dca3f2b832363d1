"""Model files of crystals in Python: boxes of atoms as displacements from lattice sites, evaluated centre by centre."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers

from ubmd.data.graph import VOIGT
from ubmd.errors import DataError, ModelError
from ubmd.potentials.force_constants.lattice import Lattice, Placement, Placer
from ubmd.potentials.interface import Prediction

NO_STRESS = "The bias of a force-constant potential has no stress: use bias_force = 0, or forces alone."


Evaluated = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]
"""displacements on all relative sites [P, 3], energies [n], gradient [P, 3], tape"""


@dataclass(frozen=True, eq=False)
class Box:
    """A placed box as arguments of a crystal's module.

    species: sublattice of each atom [n]; first: [n + 1]; atoms: the atom on each relative site of each centre [P].
    """

    placement: Placement
    species: torch.Tensor
    first: torch.Tensor
    atoms: torch.Tensor


class CrystalEvaluator:
    """Predictions of a crystal's module for boxes of any size, orientation and origin.

    The sites of a box are kept while its atoms stay near them, so structures of one trajectory are placed once.
    """

    def __init__(self, module: Any, metadata: dict[str, Any], precision: str = "double", device: str = "cpu") -> None:
        """``precision`` is that of the module already, and ``device`` the CPU."""
        self.module = module
        record = metadata["lattice"]
        numbers = np.array([atomic_numbers[metadata["elements"][k]] for k in record["species"]])
        none = np.zeros((1, 3))
        self.lattice = Lattice(
            np.array(record["cell"]), np.array(record["scaled"]), numbers, np.eye(3, dtype=np.int64)[None], none
        )
        self.sites = [np.array(sites, dtype=np.int64) for sites in record["sites"]]
        self.max_displacement: float = record["max_displacement"]
        self._placer = Placer(self.lattice)
        self._box: Box | None = None

    def predict(self, structures: Iterable[Atoms]) -> list[Prediction]:
        """See `Model`.

        The stress is that beyond the ideal crystal's own, which structures in a fixed cell do not determine. It needs
        force constants at their true distances: labels of boxes smaller than their range fold them, and the stress
        then responds inaccurately to displacements of the sublattices against each other.

        Raises:
            DataError: a box doesn't hold the crystal, or an atom is further from its site than the force constants
                are trusted.
        """
        return [self._prediction(*self._evaluated(atoms))[0] for atoms in structures]

    def predict_with_gradient(self, atoms: Atoms) -> tuple[Prediction, np.ndarray, None]:
        """See `Model`."""
        box, evaluated = self._evaluated(atoms)
        prediction, mean = self._prediction(box, evaluated)
        mean.requires_grad_(True)
        (w,) = torch.autograd.grad(self.module.uncertainty(mean), mean)
        w = w / len(atoms)
        gradient = self.module.feature_gradient(evaluated[-1], [], self.module.directions(w, True), w)
        return prediction, -self._forces(box, gradient), None

    def uncertainty_gradient(self, atoms: Atoms) -> tuple[float, np.ndarray, None]:
        """See `Model`."""
        prediction, gradient, none = self.predict_with_gradient(atoms)
        return prediction.u, gradient, none

    def atomic_uncertainty_gradient(self, atoms: Atoms) -> NoReturn:
        """Refused with a ModelError."""
        raise ModelError(
            "A force-constant potential has no gradient of atomic uncertainties: use the structure's uncertainty."
        )

    def box(self, atoms: Atoms) -> tuple[Box, np.ndarray]:
        """The placed box, and displacements [n, 3] (Å) in the crystal's frame, within the displacement limit."""
        placement, displacements = self._placer(atoms)
        if self._box is None or self._box.placement is not placement:
            self._box = self._box_of(placement)
        return self._box, self._guarded(displacements)

    def _box_of(self, placement: Placement) -> Box:
        box = placement.supercell
        rows = [self.sites[s] + [*offset, 0] for s, offset in zip(box.sublattice, box.offset, strict=True)]
        first = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        joined = np.concatenate(rows)
        index = box.index(joined[:, 3], joined[:, :3])
        return Box(placement, *(torch.from_numpy(a.astype(np.int64)) for a in (box.sublattice, first, index)))

    def _guarded(self, displacements: np.ndarray) -> np.ndarray:
        distance = np.linalg.norm(displacements, axis=1)
        worst = int(distance.argmax())
        if not distance[worst] <= self.max_displacement:
            raise DataError(
                f"Atom {worst} is {distance[worst]:.3g} Å from its lattice site, but the force constants are trusted "
                f"up to {self.max_displacement:.3g} Å: raise crystal.max_displacement if they were trained that far."
            )
        return displacements

    def _evaluated(self, atoms: Atoms) -> tuple[Box, Evaluated]:
        """The box, and the module's results for it."""
        box, displacements = self.box(atoms)
        vectors = torch.from_numpy(displacements)[box.atoms]
        return box, (vectors, *self.module.evaluate(box.species, box.first, box.atoms, vectors, True))

    def _prediction(self, box: Box, evaluated: Evaluated) -> tuple[Prediction, torch.Tensor]:
        """The prediction, and the mean of the features [p]."""
        vectors, energy, gradient, tape = evaluated
        mean = self.module.feature_sum(self.module.features(tape, True)[0]) / len(box.species)
        prediction = Prediction(
            energy=float(energy.sum()),
            forces=self._forces(box, gradient),
            stress=self._stress(box, vectors, gradient, tape),
            u=float(self.module.uncertainty(mean)),
            atomic_u=self.module.site_uncertainties(tape).numpy(),
            feature=(mean @ self.module.factor).numpy(),
        )
        return prediction, mean

    def _forces(self, box: Box, gradient: torch.Tensor) -> np.ndarray:
        """Minus the sum of the gradient [P, 3] on each atom, in the frame of the box."""
        total = torch.zeros(len(box.species), 3, dtype=torch.float64).index_add_(0, box.atoms, gradient)
        return box.placement.turn(-total.numpy())

    def _stress(self, box: Box, vectors: torch.Tensor, gradient: torch.Tensor, tape: list[torch.Tensor]) -> np.ndarray:
        """Derivative of the energy by strain over the volume, ASE order, eV/Å^3."""
        strain = (self.module.strain_derivative(tape) + vectors.t() @ gradient).numpy()
        rotation, cell = box.placement.rotation, box.placement.cell
        turned = rotation @ strain @ rotation.T
        stress: np.ndarray = (0.5 * (turned + turned.T) / abs(np.linalg.det(cell)))[VOIGT]
        return stress
