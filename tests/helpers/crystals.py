"""Crystals with force-constant models, their numbers from the cluster basis's own numpy formulas, and LAMMPS inputs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.lammps import Prism
from ase.data import atomic_masses
from ase.geometry import find_mic

from ubmd.operators import available
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.lattice import Supercell
from ubmd.potentials.force_constants.model import TINY, CrystalModel
from ubmd.potentials.force_constants.pair_model import PairedCrystalModel
from ubmd.potentials.force_constants.pairs import PAIRS
from ubmd.potentials.force_constants.regression import Posterior

ENERGY_SCALE, FORCE_SCALE, ENERGY = 1.3, 0.7, -3.0  # the last: eV per primitive cell


CUBIC = [[-2, 2, 2], [2, -2, 2], [2, 2, -2]]  # of fcc primitive vectors: 32 cells


def boron_arsenide() -> Atoms:
    return bulk("BAs", "zincblende", 4.78)


def tin_selenide() -> Atoms:
    """Pnma, eight atoms: every element on four sublattices."""
    places = []
    for x, z in ((0.118, 0.103), (0.855, 0.482)):
        places += [(x, 0.25, z), (-x, 0.75, -z), (0.5 - x, 0.75, 0.5 + z), (0.5 + x, 0.25, 0.5 - z)]
    return Atoms("Sn4Se4", scaled_positions=places, cell=[11.501, 4.153, 4.445], pbc=True)


def triclinic() -> Atoms:
    """No symmetry at all."""
    cell = [[3.4, 0.1, -0.2], [0.9, 3.7, 0.3], [-0.5, 0.8, 4.1]]
    return Atoms("CaO", scaled_positions=[(0.05, 0.1, 0.2), (0.47, 0.55, 0.66)], cell=cell, pbc=True)


@dataclass(frozen=True, eq=False)
class Crystal:
    """A model of a crystal.

    Attributes:
        primitive: primitive cell.
        basis, posterior: what the model was made from.
        path: model file.
    """

    primitive: Atoms
    basis: ClusterBasis
    posterior: Posterior
    path: Path

    @classmethod
    def make(
        cls,
        folder: Path,
        primitive: Atoms,
        cutoffs: dict[int, float],
        mean: np.ndarray | None = None,
        max_displacement: float = 0.8,
        operators: bool = False,
        pairs: float | None = None,
        core: np.ndarray | None = None,
        limit: float | None = None,
    ) -> Crystal:
        """With random parameters (falling sizes of the terms) if none are given; ``limit``: of all shells."""
        rng = np.random.default_rng(3)
        basis = ClusterBasis.build(primitive, cutoffs, pairs=pairs)
        n, orders = basis.n_parameters, basis.parameter_orders
        scale = np.where(orders == PAIRS, 0.3, 4.0 ** (orders - 2.0))
        mean = rng.normal(size=n) * scale if mean is None else mean
        factor = 0.05 * rng.normal(size=(n, n)) / np.sqrt(n) * scale[:, None]
        alpha = dict.fromkeys(basis.all_orders, 1.0)
        limits = None if limit is None else np.full(len(basis.shells.distance), limit)
        posterior = Posterior(orders, mean, factor, alpha, {"forces": 1.0}, 0.0, core=core, limits=limits)
        model = (CrystalModel if pairs is None else PairedCrystalModel)(
            basis,
            posterior,
            energy_scale=ENERGY_SCALE,
            force_scale=FORCE_SCALE,
            max_displacement=max_displacement,
            energy=ENERGY,
        )
        model.use_operators(operators and available())
        path = folder / "crystal.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(model).save(path)
        return cls(primitive, basis, posterior, path)

    @property
    def elements(self) -> list[str]:
        return list(dict.fromkeys(self.primitive.symbols))

    def shaken(self, multiple: tuple | list, amplitude: float = 0.08, seed: int = 5) -> tuple[Atoms, Supercell]:
        """A displaced box, a multiple (3 integers or a matrix) of the primitive cell, and its sites."""
        atoms = make_supercell(self.primitive, np.diag(multiple) if np.ndim(multiple) == 1 else multiple)
        box = self.basis.supercell(atoms)
        atoms.positions += np.random.default_rng(seed).uniform(-amplitude, amplitude, (len(atoms), 3))
        return atoms, box

    def expected(self, atoms: Atoms, box: Supercell) -> Expected:
        """Numbers of a displaced box by numpy."""
        u = box.displacements(atoms)
        phi, matrix = self.basis.energy_features(u, box), self.basis.force_matrix(u, box)
        mean, factor = self.posterior.mean, self.posterior.factor
        sigma = ENERGY_SCALE * np.hypot(np.linalg.norm(phi @ factor), TINY * len(atoms))
        gradient = ENERGY_SCALE**2 * -(matrix @ (factor @ (factor.T @ phi))) / sigma
        deviations = np.sqrt(np.square(matrix @ factor).sum(1)).reshape(-1, 3)
        fixed, repulsion = self.basis.fixed(self.posterior.core, self.posterior.limits, u, box)
        return Expected(
            energy=phi @ mean + fixed + ENERGY * box.determinant,
            forces=(matrix @ mean).reshape(-1, 3) + repulsion,
            sigma=sigma,
            sigma_gradient=gradient.reshape(-1, 3),
            atomic=FORCE_SCALE * deviations.max(1),
            displacement=np.linalg.norm(u - u.mean(0), axis=1).max(),
        )

    def strain_derivative(self, u: np.ndarray, box: Supercell) -> np.ndarray:
        """dE/dstrain [3, 3] by all force constants of the box, which must be longer than two cutoffs.

        sum over ordered tuples of 1/(n - 1)! (x_j - x_k) ⊗ Phi(j, k, ...) u_k ... , with actual positions.
        """
        n = len(u)
        difference = find_mic((box.ideal[:, None] - box.ideal).reshape(-1, 3), box.cell)[0].reshape(n, n, 3)
        difference = difference + u[:, None] - u
        result = np.zeros((3, 3))
        factorial = 1.0
        for order in self.basis.orders:
            factorial *= order - 1
            phi = self.basis.force_constants(self.posterior.mean, order, box)
            for _ in range(order - 2):
                k = phi.ndim // 2
                rest = [axis for axis in range(2 * k) if axis not in (k - 1, 2 * k - 1)]
                phi = np.einsum(phi, list(range(2 * k)), u, [k - 1, 2 * k - 1], rest)
            result += np.einsum("jkbc,kc,jka->ab", phi, u, difference) / factorial
        return 0.5 * (result + result.T)


@dataclass
class Expected:
    """Energy (eV), forces (eV/Å), standard deviation of the energy with its gradient, u_i (eV/Å), max |u| (Å)."""

    energy: float
    forces: np.ndarray
    sigma: float
    sigma_gradient: np.ndarray
    atomic: np.ndarray
    displacement: float


def bonds_of(ideal: Atoms, length: float = 2.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bonds (i, j, x_j - x_i) of an ideal box, each once."""
    i, j = np.triu_indices(len(ideal), 1)
    r = find_mic(ideal.positions[j] - ideal.positions[i], ideal.cell.array)[0]
    near = np.linalg.norm(r, axis=1) < length
    return i[near], j[near], r[near]


def pair_polynomial(
    u: np.ndarray, bonds: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray]:
    """(E, forces [n, 3], dE/d(u_j - u_i) of each bond) of springs along and across bonds, up to the fourth order."""
    i, j, r = bonds
    axis = r / np.linalg.norm(r, axis=1)[:, None]
    d = u[j] - u[i]
    s = (d * axis).sum(1)
    energy = 4.0 * s**2 - 6.0 * s**3 + 5.0 * s**4 + 0.9 * (d**2).sum(1)
    slope = (8.0 * s - 18.0 * s**2 + 20.0 * s**3)[:, None] * axis + 1.8 * d
    forces = np.zeros_like(u)
    np.add.at(forces, i, slope)
    np.subtract.at(forces, j, slope)
    return energy.sum(), forces, slope


def spring_crystal(folder: Path) -> Crystal:
    """A stable crystal: the model is exactly that of springs between nearest neighbours."""
    primitive = boron_arsenide()
    basis = ClusterBasis.build(primitive, {2: 2.5, 3: 2.5, 4: 2.5})
    ideal = primitive.repeat((3, 3, 3))
    box = basis.supercell(ideal)
    u = np.random.default_rng(4).uniform(-0.2, 0.2, (2, len(ideal), 3))
    forces = np.concatenate([pair_polynomial(x, bonds_of(ideal))[1].ravel() for x in u])
    matrix = basis.force_matrix(u, box)
    mean = np.linalg.lstsq(matrix, forces, rcond=None)[0]
    assert np.abs(matrix @ mean - forces).max() < 1e-10
    return Crystal.make(folder, primitive, basis.cutoffs, mean, operators=True)


def data_file(atoms: Atoms, elements: list[str], shift: np.ndarray | None = None) -> str:
    """LAMMPS data file with 17 digits; cells are turned by ASE's Prism; then the crystal is shifted, not the box."""
    prism = Prism(atoms.cell.array)
    xx, yy, zz, xy, xz, yz = prism.get_lammps_prism()
    x = prism.vector_to_lammps(atoms.positions, wrap=False)
    x = x if shift is None else x + shift
    bounds = "".join(f"0 {b:.17g} {k}lo {k}hi\n" for b, k in zip((xx, yy, zz), "xyz", strict=True))
    masses = "".join(f"{k} {atomic_masses[Atoms(e).numbers[0]]}\n" for k, e in enumerate(elements, start=1))
    rows = "".join(
        f"{n} {elements.index(s) + 1} {p[0]:.17g} {p[1]:.17g} {p[2]:.17g}\n"
        for n, (s, p) in enumerate(zip(atoms.symbols, x, strict=True), start=1)
    )
    tilt = f"{xy:.17g} {xz:.17g} {yz:.17g} xy xz yz\n" if max(abs(xy), abs(xz), abs(yz)) > 1e-12 else ""
    head = f"test\n\n{len(atoms)} atoms\n{len(elements)} atom types\n{bounds}{tilt}"
    return f"{head}\nMasses\n\n{masses}\nAtoms # atomic\n\n{rows}"


def head(crystal: Crystal, atoms: Atoms, shift: np.ndarray | None = None, settings: str = "") -> str:
    """Write data.test and model.pt into the current folder; the script's first commands: box, atoms, pair style."""
    Path("data.test").write_text(data_file(atoms, crystal.elements, shift))
    Path("model.pt").write_bytes(crystal.path.read_bytes())
    return f"""
        units metal
        atom_style atomic
        atom_modify map array sort 0 0
        boundary p p p
        {settings}
        read_data data.test
        pair_style ubmd
        pair_coeff * * model.pt {" ".join(crystal.elements)}
        """
