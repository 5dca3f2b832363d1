"""Stillinger-Weber silicon: labels by LAMMPS, and a potential trained on small displacements."""

from functools import cache

import numpy as np
from ase import Atoms
from ase.build import bulk

from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.regression import NormalEquations, fit
from ubmd.references.lammps import LAMMPS

CONSTANT = 5.43095  # Å, where the potential has no stress
CUTOFFS = {2: 5.4, 3: 4.0, 4: 4.0}


def stillinger_weber() -> LAMMPS:
    return LAMMPS(["pair_style sw", "pair_coeff * * Si.sw Si"], ["Si"])


def trained(ideal: Atoms, cutoffs: dict[int, float], amplitude: float, count: int) -> tuple[ClusterBasis, np.ndarray]:
    """Basis and parameters after Gaussian displacements (Å per component) of a box; the labels have no noise."""
    basis = ClusterBasis.build(ideal, cutoffs)
    box = basis.supercell(ideal)
    equations = NormalEquations(basis.parameter_orders)
    rng = np.random.default_rng(0)
    calculator = stillinger_weber()
    for _ in range(count):
        atoms = ideal.copy()
        atoms.positions += rng.normal(scale=amplitude, size=atoms.positions.shape)
        atoms.calc = calculator
        equations.add(basis.force_matrix(atoms, box), atoms.get_forces())
    calculator.close()
    return basis, fit(equations).mean


@cache
def silicon(amplitude: float = 0.01, count: int = 8) -> tuple[ClusterBasis, np.ndarray]:
    """127 parameters from boxes of 64 atoms."""
    return trained(bulk("Si", "diamond", CONSTANT, cubic=True).repeat(2), CUTOFFS, amplitude, count)
