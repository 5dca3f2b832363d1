"""A force-constant potential as files hold it: the folder of a run, or a model file."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.errors import ModelError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.pairs import PAIRS
from ubmd.potentials.force_constants.regression import Posterior


class Potential(NamedTuple):
    """Cluster basis and parameters [P] (eV/Å^order)."""

    basis: ClusterBasis
    parameters: NDArray[np.float64]


def forces_by_order(potential: Potential, structures: Sequence[Atoms]) -> NDArray[np.float64]:
    """What each order contributes to the forces of structures of one box [orders, structures, n, 3], eV/Å.

    Pair functions are the last of the orders, if there are any; their core isn't counted.
    """
    basis, parameters = potential
    masked = np.stack([parameters * (basis.parameter_orders == order) for order in basis.all_orders], axis=1)
    box = basis.supercell(structures[0])
    return np.stack([basis.forces(masked, atoms, box) for atoms in structures], axis=1)


def order_shares(potential: Potential, structures: Sequence[Atoms]) -> dict[int, float]:
    """Rms force of each order over the rms of the whole force; empty where there are no forces."""
    forces = forces_by_order(potential, structures)
    total = float(np.sqrt(np.mean(forces.sum(axis=0) ** 2)))
    if total == 0.0:
        return {}
    return {o: float(np.sqrt(np.mean(f**2))) / total for o, f in zip(potential.basis.all_orders, forces, strict=True)}


def anharmonicity(potential: Potential, structures: Sequence[Atoms]) -> float:
    """Rms of the forces beyond the second order over the rms of the whole force, of the potential itself.

    Pair functions count with what is beyond their second derivatives at the ideal crystal.

    The measure of Knoop et al., Phys. Rev. Mater. 4, 083809 (2020).
    """
    forces = forces_by_order(potential, structures)
    beyond = forces[[order != 2 for order in potential.basis.all_orders]].sum(axis=0)
    if potential.basis.pairs is not None:
        beyond -= _harmonic_pair_forces(potential, structures)
    return float(np.sqrt(np.mean(beyond**2) / np.mean(forces.sum(axis=0) ** 2)))


def _harmonic_pair_forces(potential: Potential, structures: Sequence[Atoms]) -> NDArray[np.float64]:
    """Forces [structures, n, 3] of the pair functions' second derivatives at the ideal crystal, eV/Å."""
    basis, parameters = potential
    box = basis.supercell(structures[0])
    of_pairs = np.where(basis.parameter_orders == PAIRS, parameters, 0.0)
    constants = basis.force_constants(of_pairs, 2, box)
    return np.stack([-np.einsum("ijab,jb->ia", constants, box.displacements(atoms)) for atoms in structures])


def load_potential(path: Path) -> Potential:
    """Read the folder of a run with force constants (basis.npz, posterior.npz), or a model file.

    Raises:
        ModelError: there is no such potential.
    """
    path = Path(path)
    if not path.is_dir():
        return _from_model(path)
    if not (path / "basis.npz").is_file() or not (path / "posterior.npz").is_file():
        if (path / "model.pt").is_file():
            return _from_model(path / "model.pt")
        raise ModelError(f"{path} holds no force-constant potential: there is no basis.npz and posterior.npz in it.")
    return Potential(ClusterBasis.load(path / "basis.npz"), Posterior.load(path / "posterior.npz").mean)


def _from_model(path: Path) -> Potential:
    """The basis is an extra file in the model file, the parameters are a buffer of it."""
    import torch

    from ubmd.potentials.file import load_with_record
    from ubmd.potentials.force_constants.export import BASIS

    module, record = load_with_record(path)
    if record.get("kind") != "force constants":
        raise ModelError(
            f"{path} is not a force-constant potential: give a model of a crystal, from settings with [crystal]."
        )
    found = {BASIS: ""}
    torch.jit.load(str(path), map_location="cpu", _extra_files=found)
    content: Any = found[BASIS]
    return Potential(ClusterBasis.load(BytesIO(content)), module.theta.numpy())
