"""Elastic constants of force-constant potentials against finite strains of the reference itself, and against sound."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from crystal_labels import CONSTANT, CUTOFFS, silicon, stillinger_weber, trained

from ubmd.errors import DataError, SettingsError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.elastic import GPA, elastic_constants
from ubmd.potentials.force_constants.phonons import THZ, HarmonicCrystal

pytest.importorskip("spglib")


def strained_constants(crystal: Atoms, strain: float = 2e-4) -> np.ndarray:
    """C [6, 6] in GPa from stresses of LAMMPS at strained cells whose atoms have relaxed (central differences)."""
    calculator = stillinger_weber()
    columns = []
    for k, (a, b) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        stresses = []
        for sign in (-1, 1):
            tensor = np.eye(3)
            tensor[a, b] += sign * strain / (1 if k < 3 else 2)
            tensor[b, a] = tensor[a, b]
            atoms = crystal.copy()
            atoms.set_cell(atoms.cell @ tensor, scale_atoms=True)
            atoms.calc = calculator
            BFGS(atoms, logfile=None).run(fmax=1e-6, steps=200)
            stresses.append(atoms.get_stress())
        columns.append((stresses[1] - stresses[0]) / (2 * strain))
    calculator.close()
    return GPA * np.array(columns).T


def hexagonal_diamond() -> Atoms:
    """Lonsdaleite, relaxed: four atoms whose internal parameter isn't fixed by symmetry."""
    ratio, u = np.sqrt(8 / 3), 0.0625
    places = [(1 / 3, 2 / 3, u), (2 / 3, 1 / 3, 0.5 + u), (1 / 3, 2 / 3, 0.5 - u), (2 / 3, 1 / 3, 1 - u)]
    cell = 3.84 * np.array([[1, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, ratio]])
    atoms = Atoms("Si4", scaled_positions=places, cell=cell, pbc=True)
    atoms.calc = stillinger_weber()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-7, steps=300)
    atoms.calc.close()
    atoms.calc = None
    return atoms


@pytest.mark.parametrize(("amplitude", "tolerance"), [(0.01, 2e-3), (0.1, 0.05)])
def test_silicon_has_the_constants_of_its_reference(amplitude, tolerance):
    """The second is the amplitude of 400 K: anharmonic labels, within the accuracy that we promise."""
    expected = strained_constants(bulk("Si", "diamond", CONSTANT, cubic=True))
    found = elastic_constants(*silicon(amplitude))
    c11, c12, c44 = found.cubic()
    assert c11 == pytest.approx(expected[0, 0], rel=tolerance)
    assert c12 == pytest.approx(expected[0, 1], rel=tolerance)
    assert c44 == pytest.approx(expected[3, 3], rel=tolerance)
    np.testing.assert_allclose(found.matrix, expected, atol=tolerance * expected.max())
    # without the relaxation of the two sublattices C44 would be twice as large: the agreement is no accident
    assert expected[3, 3] < 65.0


def test_a_hexagonal_crystal_has_the_constants_of_its_reference():
    crystal = hexagonal_diamond()
    expected = strained_constants(crystal)
    basis, parameters = trained(crystal.repeat((3, 3, 2)), {2: 4.0, 3: 4.0}, 0.003, 4)
    assert len(basis.lattice.numbers) == 4
    found = elastic_constants(basis, parameters)
    np.testing.assert_allclose(found.matrix, expected, atol=2e-3 * expected.max())
    assert found.misfit < 0.2
    assert found.cubic() is None
    assert abs(expected[0, 0] - expected[2, 2]) > 5.0


def test_sound_travels_as_the_elastic_constants_say():
    """Christoffel's equation against frequencies of long waves, in a direction without symmetry."""
    basis, parameters = silicon()
    crystal = HarmonicCrystal.from_basis(basis, parameters)
    direction = np.array([0.31, -0.52, 0.79])
    direction /= np.linalg.norm(direction)
    length = 1e-3  # 1/Å
    q = length * direction @ crystal.lattice.cell.T
    velocity = crystal.frequencies(q)[0, :3] / THZ / (2 * np.pi * length)  # sqrt(eV/u)
    voigt = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])
    c = elastic_constants(basis, parameters).matrix[voigt[:, :, None, None], voigt] / GPA
    density = crystal.masses.sum() / abs(np.linalg.det(crystal.lattice.cell))
    christoffel = np.einsum("acdb,c,d->ab", c, direction, direction)
    expected = np.sqrt(np.linalg.eigvalsh(christoffel) / density)
    np.testing.assert_allclose(velocity, expected, rtol=1e-5)


def test_a_turned_crystal_has_turned_constants():
    turned = bulk("Si", "diamond", CONSTANT, cubic=True).repeat(2)
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    constants = elastic_constants(*trained(turned, CUTOFFS | {4: 2.5}, 0.005, 4))
    assert constants.cubic() is None
    upright = elastic_constants(*silicon())
    for one, other in zip(_invariants(constants.matrix), _invariants(upright.matrix), strict=True):
        assert one == pytest.approx(other, rel=2e-3)


def _invariants(matrix: np.ndarray) -> tuple[float, float]:
    """C_aabb and C_abab."""
    return matrix[:3, :3].sum(), np.trace(matrix[:3, :3]) + 2 * np.trace(matrix[3:, 3:])


def test_errors_say_what_to_do():
    basis = ClusterBasis.build(bulk("Si", "diamond", CONSTANT), {3: 2.5})
    with pytest.raises(SettingsError, match="second order"):
        elastic_constants(basis, np.zeros(basis.n_parameters))
    with pytest.raises(DataError, match="parameters"):
        elastic_constants(basis, np.zeros(2))
