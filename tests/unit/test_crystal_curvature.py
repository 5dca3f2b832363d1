"""Fits without negative curvature: the quadratic programme, and what is left of negative modes in boxes of atoms."""

from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from crystals import boron_arsenide, tin_selenide
from scipy.optimize import minimize

from ubmd.errors import DataError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.curvature import (
    Curvature,
    boxes_of,
    commensurate,
    lowest_curvature,
    nearest,
    stabilised,
    wave_vectors,
)
from ubmd.potentials.force_constants.regression import Posterior

pytest.importorskip("spglib")

CELLS = {"zincblende": boron_arsenide, "orthorhombic": tin_selenide, "one atom": lambda: bulk("Cu")}
CUTOFFS = {"zincblende": {2: 4.8, 3: 2.5}, "orthorhombic": {2: 4.2}, "one atom": {2: 3.7}}


def random_fit(kind: str, pairs: float | None = None, seed: int = 1) -> tuple[ClusterBasis, Posterior]:
    """Random parameters: some waves have negative energy."""
    basis = ClusterBasis.build(CELLS[kind](), CUTOFFS[kind], pairs=pairs)
    rng = np.random.default_rng(seed)
    n = basis.n_parameters
    scale = np.where(basis.parameter_orders == 0, 0.3, 2.0)
    factor = scale[:, None] * (np.eye(n) + 0.2 * rng.standard_normal((n, n)))
    orders = basis.parameter_orders
    return basis, Posterior(
        orders, scale * rng.standard_normal(n), factor, dict.fromkeys(basis.all_orders, 1.0), {"forces": 9.0}, -3.0
    )


def eigenvalues(basis: ClusterBasis, parameters: np.ndarray, repeat: tuple[int, int, int], kind: str) -> np.ndarray:
    """Of all second derivatives of the energy of a box, written out as one matrix."""
    box = basis.supercell(CELLS[kind]().repeat(repeat))
    constants = basis.force_constants(parameters, 2, box)
    return np.linalg.eigvalsh(constants.transpose(0, 2, 1, 3).reshape(3 * len(box), -1))


@pytest.mark.parametrize(("kind", "pairs"), [("zincblende", None), ("orthorhombic", 5.2), ("one atom", None)])
def test_no_box_has_a_negative_mode_but_three_translations(kind, pairs):
    basis, posterior = random_fit(kind, pairs)
    repeat = (1, 2, 2) if kind == "orthorhombic" else (3, 3, 2)
    assert eigenvalues(basis, posterior.mean, repeat, kind)[0] < -0.1
    found = stabilised(basis, posterior, commensurate([np.diag([3, 1, 1]), np.diag(repeat)]))
    assert found.rows > 0
    assert found.lowest_before < -0.1
    for parts in (basis, basis.without_pairs()):
        mean = found.posterior.mean[: parts.n_parameters]
        for size in (repeat, (3, 1, 1)):
            values = eigenvalues(parts, mean, size, kind)
            assert values[0] > -1e-8
            assert np.sum(np.abs(values) < 1e-6) >= 3


def test_everything_but_the_mean_is_that_of_the_plain_fit():
    basis, posterior = random_fit("zincblende")
    found = stabilised(basis, posterior, wave_vectors(basis.lattice, [2 * np.eye(3, dtype=np.int64)])).posterior
    assert found.factor is posterior.factor
    assert replace(found, mean=posterior.mean) == replace(posterior, mean=posterior.mean)
    assert np.abs(found.mean - posterior.mean)[basis.parameter_orders == 2].max() > 1e-3


def test_a_fit_that_is_stable_stays_as_it_is():
    basis, posterior = random_fit("zincblende")
    q = wave_vectors(basis.lattice, [2 * np.eye(3, dtype=np.int64)])
    once = stabilised(basis, posterior, q).posterior
    again = stabilised(basis, once, q)
    assert again.rows == 0
    assert again.posterior.mean is once.mean


def test_the_solution_is_the_nearest_one():
    """Against SciPy's general optimiser with the same inequalities at all wave vectors, and against feasible points."""
    basis, posterior = random_fit("one atom")
    q = commensurate([2 * np.eye(3, dtype=np.int64)])
    curvature = Curvature(basis)

    def distance(theta: np.ndarray) -> float:
        return float(np.sum(np.linalg.solve(posterior.factor, theta - posterior.mean) ** 2))

    def lowest(theta: np.ndarray) -> np.ndarray:
        return np.linalg.eigvalsh(curvature.matrices(theta, q[1:])).min(axis=1)

    found = stabilised(basis, posterior, q).posterior.mean
    general = minimize(
        distance, found, constraints={"type": "ineq", "fun": lowest}, method="SLSQP", options={"maxiter": 300}
    )
    assert distance(found) == pytest.approx(distance(general.x), rel=1e-2)


def test_least_distance_has_the_conditions_of_a_minimum():
    """z = Gᵀλ with λ ≥ 0, zero where an inequality is not tight (Karush, Kuhn and Tucker)."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        matrix, inside = rng.standard_normal((7, 4)), rng.standard_normal(4)
        bounds = matrix @ inside - rng.uniform(0.0, 1.0, 7)
        z = nearest(matrix, bounds)
        slack = matrix @ z - bounds
        assert slack.min() > -1e-9
        tight = slack < 1e-9
        weights = np.linalg.lstsq(matrix[tight].T, z, rcond=None)[0]
        np.testing.assert_allclose(matrix[tight].T @ weights, z, atol=1e-9)
        assert weights.min(initial=0.0) > -1e-9


def test_contradictions_are_errors():
    with pytest.raises(DataError, match="contradict"):
        nearest(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([1.0, 1.0]))


def test_rows_are_energies_of_waves():
    """v†Φ(q)v of a wave is the energy per cell of the same displacements in a box, whose second order is quadratic."""
    basis, _ = random_fit("orthorhombic", 5.2)
    alone, curvature = basis.without_pairs(), Curvature(basis.without_pairs())
    atoms = tin_selenide().repeat((1, 3, 2))
    box = alone.supercell(atoms)
    rng = np.random.default_rng(2)
    v = rng.standard_normal((8, 3)) + 1j * rng.standard_normal((8, 3))
    q = np.array([0.0, 1.0 / 3.0, 0.0])
    phase = np.exp(2j * np.pi * (box.ideal @ np.linalg.inv(alone.lattice.cell) @ q))
    wave = v[box.sublattice] * phase[:, None]
    energies = alone.energy_features(wave.real, box) + alone.energy_features(wave.imag, box)
    row = curvature._row(v.ravel(), q)
    np.testing.assert_allclose(row, 2.0 * energies / box.determinant, atol=1e-10 * np.abs(row).max())


def test_wave_vectors_are_those_of_the_boxes():
    lattice = random_fit("zincblende")[0].lattice
    box = np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]])
    found = commensurate([box])
    assert len(found) == 4  # Γ and three points X
    assert np.abs(found @ box.T - np.rint(found @ box.T)).max() < 1e-9
    many = wave_vectors(lattice, [box])
    keys = [{tuple(key) for key in np.rint(1e6 * q).astype(int) % 10**6} for q in (many, -many)]
    assert len(keys[0]) == len(keys[1]) == len(many)
    assert len(keys[0] & keys[1]) == 8  # the only ones that are their own negative
    assert {tuple(key) for key in np.rint(1e6 * found).astype(int) % 10**6} <= keys[0] | keys[1]
    assert len(boxes_of([box, box, 2 * box])) == 2


def test_the_lowest_curvature_is_that_of_the_box():
    basis, posterior = random_fit("zincblende")
    q = commensurate([2 * np.eye(3, dtype=np.int64)])
    found = lowest_curvature(basis, posterior.mean, q)
    assert found.curvature == pytest.approx(eigenvalues(basis, posterior.mean, (2, 2, 2), "zincblende")[0], abs=1e-9)
    assert np.abs(2.0 * found.q - np.rint(2.0 * found.q)).max() < 1e-9
