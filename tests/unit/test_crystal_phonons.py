"""Phonons of force-constant potentials against phonopy, finite displacements, and a known conductivity."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.phonons import Phonons
from crystal_labels import silicon, stillinger_weber
from typer.testing import CliRunner

from ubmd.cli.main import app
from ubmd.errors import DataError, ModelError, SettingsError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.export import export_crystal
from ubmd.potentials.force_constants.phonons import HarmonicCrystal, conductivity, make_phono3py, supercell_repeats
from ubmd.potentials.force_constants.potential import load_potential
from ubmd.potentials.force_constants.regression import Posterior

pytest.importorskip("spglib")

Q = np.random.default_rng(0).uniform(-0.5, 0.5, (5, 3))


def low_symmetry() -> tuple[ClusterBasis, np.ndarray]:
    """Five atoms of two species, and made-up parameters: tensors without symmetry of their own."""
    places = [[0, 0, 0], [0.5, 0.48, 0.5], [0.5, 0.03, 0.1], [0, 0.52, 0.4], [0.25, 0.75, 0.8]]
    atoms = Atoms("NaNaClClCl", scaled_positions=places, cell=[[4, 0, 0], [0.3, 4.4, 0], [0.1, -0.2, 5]], pbc=True)
    basis = ClusterBasis.build(atoms, {2: 3.3})
    return basis, np.random.default_rng(1).normal(size=basis.n_parameters)


def test_frequencies_of_silicon_are_those_of_its_reference():
    """ASE's finite displacements of the reference in a large box."""
    crystal = HarmonicCrystal.from_basis(*silicon())
    primitive = bulk("Si", "diamond", 5.43095)
    phonons = Phonons(primitive, stillinger_weber(), supercell=(5, 5, 5), delta=0.002)
    forces = []
    box = primitive.repeat(5)
    for atom in range(2):
        for axis in range(3):
            pair = []
            for sign in (-1, 1):
                moved = box.copy()
                moved.positions[atom, axis] += sign * phonons.delta
                moved.calc = phonons.calc
                pair.append(moved.get_forces())
            forces.append((pair[0] - pair[1]) / (2 * phonons.delta))
    phonons.calc.close()
    constants = np.array(forces).reshape(2, 3, 125, 2, 3)  # of the atoms in cell 0 with all others
    cells = np.array(list(np.ndindex(5, 5, 5)))
    cells = cells - 5 * (cells > 2)
    masses = primitive.get_masses()
    cartesian = Q @ np.linalg.inv(primitive.cell[:]).T  # our primitive cell may be another one
    for q, found in zip(Q, crystal.frequencies(cartesian @ crystal.lattice.cell.T), strict=True):
        # phases from cell to cell: the same eigenvalues
        matrix = np.einsum("iarjb,r->iajb", constants, np.exp(2j * np.pi * cells @ q))
        matrix = (matrix / np.sqrt(masses[:, None, None, None] * masses[:, None])).reshape(6, 6)
        expected = np.sqrt(np.linalg.eigvalsh(0.5 * (matrix + matrix.conj().T))) * 15.633302
        np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("potential", [silicon, low_symmetry])
@pytest.mark.filterwarnings("ignore")
def test_frequencies_are_those_of_phonopy(potential):
    phonopy = pytest.importorskip("phonopy")
    basis, parameters = potential()
    lattice = basis.lattice
    cell = phonopy.structure.atoms.PhonopyAtoms(
        numbers=lattice.numbers, scaled_positions=lattice.scaled, cell=lattice.cell
    )
    repeats = supercell_repeats(lattice, basis.cutoffs[2])
    program = phonopy.Phonopy(cell, np.diag(repeats), primitive_matrix=np.eye(3))
    box = program.supercell
    atoms = Atoms(numbers=box.numbers, scaled_positions=box.scaled_positions, cell=box.cell, pbc=True)
    program.force_constants = basis.force_constants(parameters, 2, basis.supercell(atoms))
    program.run_qpoints(Q)
    expected = program.get_qpoints_dict()["frequencies"]
    crystal = HarmonicCrystal.from_basis(basis, parameters, masses=cell.masses)
    np.testing.assert_allclose(crystal.frequencies(Q), expected, rtol=1e-6)
    assert np.ptp(expected, axis=0).min() > 0.1  # branches that move with q


def test_dispersion_and_density_of_states():
    crystal = HarmonicCrystal.from_basis(*silicon())
    bands = crystal.dispersion(60)
    assert bands.frequencies.shape == (60, 6)
    assert bands.labels[:4] == ["G", "X", "W", "K"]
    np.testing.assert_allclose(bands.frequencies[0], crystal.frequencies([0, 0, 0])[0], atol=1e-5)
    np.testing.assert_allclose(bands.frequencies[0, :3], 0.0, atol=1e-4)
    x = np.argmin(np.abs(bands.distance - bands.places[1]))
    zone_boundary = np.array([1, 0, 0]) / 5.43095 @ crystal.lattice.cell.T
    np.testing.assert_allclose(bands.frequencies[x], crystal.frequencies(zone_boundary)[0], rtol=1e-6)
    frequency, density = crystal.density_of_states(mesh=8, bins=150)
    step = frequency[1] - frequency[0]
    assert density.sum() * step == pytest.approx(6.0, rel=1e-3)
    axis = (np.arange(8) + 0.5) / 8
    mesh = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3)
    assert (density * frequency).sum() * step == pytest.approx(crystal.frequencies(mesh).sum(axis=1).mean(), rel=0.01)
    with pytest.raises(SettingsError, match="is not a path of this lattice"):
        crystal.dispersion(path="GQ")


@pytest.mark.filterwarnings("ignore")
def test_conductivity_of_stillinger_weber_silicon(tmp_path: Path):
    """490 ± 30 W/(m K) at 300 K, relaxation time approximation, mesh 11³."""
    phono3py = pytest.importorskip("phono3py")
    pytest.importorskip("phono3py.file_IO")
    basis, parameters = silicon()
    found = conductivity(basis, parameters, temperatures=[300.0, 600.0], mesh=11, folder=tmp_path)
    assert found.mesh == (11, 11, 11)
    assert found.mean[0] == pytest.approx(490.0, abs=30.0)
    np.testing.assert_allclose(found.tensor[0], np.eye(3) * found.mean[0], atol=0.01)
    assert 0.4 < found.mean[1] / found.mean[0] < 0.5  # 1/T where all modes are excited, steeper below
    read = phono3py.load(tmp_path / "phono3py.yaml", produce_fc=False, log_level=0)
    third = basis.force_constants(parameters, 3, basis.supercell(_atoms(read.supercell)))
    written = phono3py.file_IO.read_fc3_from_hdf5(str(tmp_path / "fc3.hdf5"))
    np.testing.assert_allclose(written, third, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_phono3py_gets_the_force_constants_of_its_own_cells():
    """In a crystal of two species: phonopy's frequencies through phono3py's second order equal ours."""
    pytest.importorskip("phono3py")
    basis = ClusterBasis.build(bulk("BAs", "zincblende", 4.777), {2: 3.5, 3: 3.4})
    parameters = np.random.default_rng(3).normal(size=basis.n_parameters)
    program = make_phono3py(basis, parameters)
    assert len(program.supercell) == 2 * np.prod(supercell_repeats(basis.lattice, 3.4))
    atoms = _atoms(program.supercell)
    u = np.random.default_rng(4).normal(scale=0.1, size=(len(atoms), 3))
    order = basis.parameter_orders == 3
    forces = -0.5 * np.einsum("ijkabc,jb,kc->ia", program.fc3, u, u)
    np.testing.assert_allclose(forces, basis.forces(parameters * order, u, basis.supercell(atoms)), atol=1e-10)


def test_supercells_keep_images_apart():
    lattice = ClusterBasis.build(bulk("Si", "diamond", 5.43095), {2: 2.5}).lattice
    assert supercell_repeats(lattice, 1.0) == (1, 1, 1)
    assert supercell_repeats(lattice, 5.4) == (3, 3, 3)  # shortest vector 11.5 Å
    assert supercell_repeats(lattice, 5.8) != (3, 3, 3)


def test_errors_say_what_to_do():
    basis = ClusterBasis.build(bulk("Si", "diamond", 5.43), {2: 2.5})
    with pytest.raises(SettingsError, match="orders 2 and 3"):
        make_phono3py(basis, np.zeros(basis.n_parameters))
    with pytest.raises(DataError, match="parameters"):
        HarmonicCrystal.from_basis(basis, np.zeros(99))


def _atoms(supercell) -> Atoms:
    places = supercell.scaled_positions
    return Atoms(numbers=supercell.numbers, scaled_positions=places, cell=supercell.cell, pbc=True)


def test_the_command_writes_pictures_and_numbers(tmp_path: Path):
    basis, parameters = silicon()
    basis.save(tmp_path / "basis.npz")
    _posterior(basis, parameters).save(tmp_path / "posterior.npz")
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["phonons", str(tmp_path), "--out", str(out), "--path", "GXKGL"])
    assert result.exit_code == 0, result.output
    assert "C11 = 151." in result.output
    assert "Space group Fd-3m (227), 48 operations\n" in result.output
    numbers = np.load(out / "phonons.npz")
    assert numbers["labels"].tolist() == ["G", "X", "K", "G", "L"]
    np.testing.assert_allclose(numbers["frequencies"].max(), 17.83, atol=0.02)
    assert (out / "phonons.png").read_bytes().startswith(b"\x89PNG")
    missing = CliRunner().invoke(app, ["phonons", str(tmp_path / "out")])
    assert missing.exit_code == 1


def test_a_model_file_is_enough(tmp_path: Path):
    basis, parameters = silicon()
    export_crystal(basis, _posterior(basis, parameters), tmp_path / "model.pt", operators=False)
    for source in (tmp_path / "model.pt", tmp_path):
        found = load_potential(source)
        np.testing.assert_array_equal(found.parameters, parameters)
        expected = HarmonicCrystal.from_basis(basis, parameters).frequencies(Q)
        np.testing.assert_array_equal(HarmonicCrystal.from_basis(*found).frequencies(Q), expected)
    with pytest.raises(ModelError, match=r"no basis\.npz"):
        load_potential(tmp_path.parent)


def _posterior(basis: ClusterBasis, parameters: np.ndarray) -> Posterior:
    width = np.eye(len(parameters))
    return Posterior(basis.parameter_orders, parameters, width, dict.fromkeys((2, 3, 4), 1.0), {"forces": 1.0}, 0.0)
