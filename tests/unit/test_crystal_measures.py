"""Phonons, elastic constants and equations of state of any potential, against slow formulas; and their commands."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa
from crystal_labels import CONSTANT, silicon, stillinger_weber
from typer.testing import CliRunner

from ubmd import Calculator
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.measure.crystal import check_crystal, largest_uncertainty, relaxed, respond, strained
from ubmd.measure.elastic import equation_of_state, strained_constants
from ubmd.measure.phonons import enough_repeats, phonons
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.elastic import ElasticConstants
from ubmd.potentials.force_constants.export import export_crystal
from ubmd.potentials.force_constants.phonons import THZ, HarmonicCrystal
from ubmd.potentials.force_constants.regression import Posterior

ALLOY = Atoms(
    "CuAuCu",
    scaled_positions=[[0.02, 0, 0], [0.5, 0.47, 0.03], [0.1, 0.5, 0.55]],
    cell=[[4.0, 0, 0], [0.2, 3.8, 0], [0.1, -0.3, 4.2]],
    pbc=True,
)
"""no symmetry, no minimum"""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of silicon that has seen small strains and displacements; three seconds."""
    folder, rng, calculator = tmp_path_factory.mktemp("network"), np.random.default_rng(0), stillinger_weber()
    structures = []
    for scale in [0.02, 0.06, 0.12] * 20:
        atoms = strained(bulk("Si", "diamond", CONSTANT, cubic=True), rng.normal(scale=0.02, size=6))
        atoms.positions += rng.normal(scale=scale, size=atoms.positions.shape)
        atoms.calc = calculator
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    calculator.close()
    write_structures(folder / "train.extxyz", structures)
    table = {
        "training_file": "train.extxyz",
        "output_dir": str(folder / "net"),
        "model": {"cutoff": 4.5, "hidden": [16, 16], "n_basis": 5, "n_radial": 4},
        "training": {"epochs": 100, "stress_weight": 0.1},
        "uncertainty": {"projections": 32},
    }
    (folder / "train.toml").write_text(tomli_w.dumps(table))
    result = CliRunner().invoke(app, ["train", str(folder / "train.toml")])
    assert result.exit_code == 0, result.output
    return folder / "net"


def slow_squares(calculator: AseCalculator, crystal: Atoms, repeats: tuple[int, int, int], step: float) -> np.ndarray:
    """Squared frequencies (THz^2) at all wave vectors that fit into the box [K, 3S], from its whole Hessian.

    Only there no force constant has to be shared among images.
    """
    box = crystal.repeat(repeats)
    n, cells = len(crystal), np.array(list(np.ndindex(*repeats)))
    hessian = np.zeros((n, 3, len(box), 3))
    for atom, axis in np.ndindex(n, 3):
        forces = []
        for sign in (1, -1):
            moved = box.copy()
            moved.positions[atom, axis] += sign * step
            moved.calc = calculator
            forces.append(moved.get_forces())
        hessian[atom, axis] = -(forces[0] - forces[1]) / (2 * step)
    blocks = hessian.reshape(n, 3, len(cells), n, 3)
    masses = np.repeat(crystal.get_masses(), 3)
    result = []
    for q in cells / np.array(repeats):
        matrix = np.einsum("iarjb,r->iajb", blocks, np.exp(2j * np.pi * cells @ q)).reshape(3 * n, 3 * n)
        matrix = matrix / np.sqrt(np.outer(masses, masses))
        result.append(np.linalg.eigvalsh(0.5 * (matrix + matrix.conj().T)) * THZ**2)
    return np.array(result)


def _posterior(basis: ClusterBasis, parameters: np.ndarray) -> Posterior:
    scales = dict.fromkeys((2, 3, 4), 1.0)
    return Posterior(basis.parameter_orders, parameters, np.eye(len(parameters)), scales, {"forces": 1.0}, 0.0)


@pytest.mark.parametrize("case", ["network", "low symmetry", "left-handed"])
def test_phonons_are_those_of_the_whole_hessian(case, network):
    pytest.importorskip("phonopy")
    crystal, repeats, calculator = ALLOY, (2, 2, 1), EMT()
    if case == "network":
        crystal, repeats, calculator = bulk("Si", "diamond", CONSTANT), (2, 2, 2), Calculator(network / "model.pt")
    if case == "left-handed":
        crystal = Atoms(ALLOY.symbols, positions=ALLOY.positions, cell=ALLOY.cell[[1, 0, 2]], pbc=True)
    found = phonons(calculator, crystal, repeats, displacement=1e-3)
    expected = slow_squares(calculator, crystal, repeats, 1e-3)
    scaled = np.array(list(np.ndindex(*repeats))) / np.array(repeats)
    cartesian = scaled @ np.linalg.inv(np.array(crystal.cell)).T
    found.program.run_qpoints(cartesian @ found.program.primitive.cell.T)  # in phonopy's own primitive cell
    frequencies = found.program.qpoints.frequencies
    # squares as well: near zero a frequency is the root of a difference
    np.testing.assert_allclose(np.sign(frequencies) * frequencies**2, expected, atol=3e-4)
    large = expected > 0.5
    np.testing.assert_allclose(frequencies[large], np.sqrt(expected[large]), atol=1e-5)
    assert expected.max() > 10.0
    assert found.supercell == len(crystal) * np.prod(repeats)


def test_phonons_are_those_of_force_constants(tmp_path):
    """A supercell longer than twice their cutoff holds all of them: equal at any wave vector, also between its own."""
    pytest.importorskip("phonopy")
    basis, parameters = silicon()
    export_crystal(basis, _posterior(basis, parameters), tmp_path / "model.pt", operators=False)
    found = phonons(Calculator(tmp_path / "model.pt"), bulk("Si", "diamond", CONSTANT), (4, 4, 4), 1e-3, 40, "GXKGL")
    expected = HarmonicCrystal.from_basis(basis, parameters).dispersion(40, "GXKGL")
    np.testing.assert_allclose(found.bands.frequencies, expected.frequencies, atol=2e-3)
    np.testing.assert_allclose(found.bands.distance, expected.distance, atol=1e-9)


def test_imaginary_frequencies_are_negative():
    pytest.importorskip("phonopy")
    found = phonons(EMT(), relaxed(EMT(), bulk("Cu", "bcc", a=2.87), cell="free"), (5, 5, 5))
    assert found.bands.frequencies.min() < -0.5
    several = bulk("Cu", cubic=True)
    several.set_masses([63, 63, 65, 65])
    with pytest.raises(DataError, match="Atoms of Cu have several masses"):
        phonons(EMT(), several)


def test_density_and_bands_belong_together():
    pytest.importorskip("phonopy")
    calculator = stillinger_weber()
    found = phonons(calculator, bulk("Si", "diamond", CONSTANT), (3, 3, 3), points=60)
    calculator.close()
    frequency, states = found.density
    assert np.trapezoid(states, frequency) == pytest.approx(6.0, rel=5e-3)
    assert found.bands.frequencies.shape == (60, 6)
    assert found.bands.labels[:3] == ["G", "X", "W"]
    assert found.bands.frequencies.max() == pytest.approx(17.83, abs=0.02)  # as from force constants
    assert found.bands.frequencies.min() == pytest.approx(0.0, abs=1e-3)
    assert found.uncertainty is None
    with pytest.raises(SettingsError, match="is not a path of this lattice"):
        phonons(EMT(), bulk("Cu"), (1, 1, 1), path="GQ")


def test_supercells_are_long_enough():
    assert enough_repeats(bulk("Si", "diamond", CONSTANT)) == (4, 4, 4)  # 3.14 Å between faces
    assert enough_repeats(bulk("Si", "diamond", CONSTANT, cubic=True), 10.8) == (2, 2, 2)
    assert enough_repeats(bulk("Si", "diamond", CONSTANT, cubic=True), 10.9) == (3, 3, 3)


def slow_constants(calculator: AseCalculator, crystal: Atoms, step: float = 0.004) -> np.ndarray:
    """C [6, 6] in GPa from second differences of the energy of strained cells whose atoms have relaxed."""

    def energy(strain: np.ndarray) -> float:
        atoms = relaxed(calculator, strained(crystal, strain), force=1e-5)
        return respond(calculator, [atoms])[0].energy

    unit, rest = step * np.eye(6), energy(np.zeros(6))
    matrix = np.zeros((6, 6))
    for k in range(6):
        matrix[k, k] = energy(unit[k]) + energy(-unit[k]) - 2 * rest
    for k, m in combinations(range(6), 2):
        both = [s * t * energy(s * unit[k] + t * unit[m]) for s in (1, -1) for t in (1, -1)]
        matrix[k, m] = matrix[m, k] = sum(both) / 4
    return matrix / (step**2 * crystal.get_volume() * GPa)


@pytest.fixture(scope="module")
def hexagonal() -> Atoms:
    """Copper with an internal freedom under shear, and a ratio c/a that changes with the volume."""
    return relaxed(EMT(), bulk("Cu", "hcp", a=2.55, c=4.2), cell="free", force=1e-6)


def test_elastic_constants_are_second_derivatives_of_the_energy(network, hexagonal):
    model = Calculator(network / "model.pt")
    cubic = relaxed(model, bulk("Si", "diamond", CONSTANT), cell="free")
    for calculator, crystal in ((EMT(), hexagonal), (model, cubic)):
        found, uncertainty = strained_constants(calculator, crystal, 0.002)
        np.testing.assert_allclose(found.matrix, slow_constants(calculator, crystal), atol=0.004 * found.matrix.max())
        assert found.misfit < 0.01
        assert found.stable
        assert (uncertainty is None) == (calculator is not model)
    assert found.cubic(1e-3)[0] == pytest.approx(151.4, rel=0.15)  # of the reference
    assert found.cubic(1e-3)[2] == pytest.approx(56.4, rel=0.3)  # 110 without relaxation of the atoms


def test_the_bulk_modulus_is_that_of_the_equation_of_state(network, hexagonal):
    """Also where the shape of the cell has to follow, and by a parabola through three close volumes."""
    model = Calculator(network / "model.pt")
    cubic = relaxed(model, bulk("Si", "diamond", CONSTANT), cell="free")
    for calculator, crystal, span in ((EMT(), hexagonal, 0.05), (model, cubic, 0.03)):
        state = equation_of_state(calculator, crystal, span, force=1e-4)
        constants, _ = strained_constants(calculator, crystal)
        assert state.modulus == pytest.approx(constants.bulk_modulus, rel=0.01)
        assert state.volume == pytest.approx(crystal.get_volume(), rel=1e-3)
        assert state.misfit < 1e-4
        near = equation_of_state(calculator, crystal, 0.004, points=5, force=1e-5)
        curvature = 2 * np.polyfit(near.volumes - near.volume, near.energies - near.energy, 2)[0]
        assert state.modulus == pytest.approx(state.volume * curvature / GPa, rel=0.02)
        np.testing.assert_allclose(state.energy_at(state.volumes), state.energies, atol=1e-4 * state.atoms)


def test_the_derivative_of_the_bulk_modulus_is_one_by_pressure():
    crystal = relaxed(EMT(), bulk("Cu"), cell="free")
    state = equation_of_state(EMT(), crystal)
    volumes = state.volume * np.array([0.975, 0.99, 1.01, 1.025])
    step = 1e-3 * state.volume
    curve = np.array([state.energy_at(volumes + k * step) for k in (-1, 0, 1)])
    pressure = (curve[0] - curve[2]) / (2 * step)
    modulus = volumes * (curve[2] - 2 * curve[1] + curve[0]) / step**2
    assert np.polyfit(pressure, modulus, 1)[0] == pytest.approx(state.derivative, rel=0.03)
    with pytest.raises(DataError, match="no minimum between"):
        equation_of_state(EMT(), bulk("Cu", a=4.2), 0.05)


def test_turned_constants_are_those_of_the_turned_crystal(hexagonal):
    turned = hexagonal.copy()
    turned.rotate(35, (1, 2, -1), rotate_cell=True)
    rotation = np.linalg.solve(np.array(hexagonal.cell), np.array(turned.cell)).T
    upright, _ = strained_constants(EMT(), hexagonal, 0.002)
    found, _ = strained_constants(EMT(), turned, 0.002)
    np.testing.assert_allclose(upright.turned(rotation).matrix, found.matrix, atol=0.02)
    assert np.abs(upright.matrix - found.matrix).max() > 5.0
    assert found.bulk_modulus == pytest.approx(upright.bulk_modulus, rel=1e-4)
    assert not ElasticConstants(np.diag([1.0, 1, 1, 1, 1, -1]), 0.0).stable


def test_batches_say_what_structures_one_by_one_say(network):
    calculator = Calculator(network / "model.pt")
    crystal = bulk("Si", "diamond", CONSTANT)
    several = [strained(crystal, k * 0.01 * np.eye(6)[k]) for k in range(3)]
    for atoms, found in zip(several, respond(calculator, several), strict=True):
        atoms.calc = calculator
        assert found.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(found.stress, atoms.get_stress(), atol=1e-10)
        assert found.atomic_u == pytest.approx(calculator.results["atomic_uncertainties"].max())
    largest = largest_uncertainty(respond(calculator, several))
    assert largest.structures == 3
    assert largest.u == pytest.approx(max(calculator.evaluator.predict_one(atoms).u for atoms in several))


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        (molecule("H2O"), "is not periodic"),
        (fcc111("Cu", (1, 1, 4), vacuum=6.0), "along cell vectors 1 and 2"),
        (fcc111("Cu", (1, 1, 4), vacuum=6.0, periodic=True), r"12\.0 Å of empty space along cell vector 3"),
        (Atoms("Cu", cell=[3, 3, 0], pbc=True), "without a whole cell"),
    ],
)
def test_what_is_not_a_crystal_is_refused(atoms, words):
    with pytest.raises(DataError, match=words):
        check_crystal(atoms)
    check_crystal(bulk("Cu"))


def test_empty_space_is_more_than_the_cutoff():
    layers = Atoms("Cu", cell=[2.5, 2.5, 5.0], pbc=True)
    check_crystal(layers)
    with pytest.raises(DataError, match=r"5\.0 Å of empty space"):
        check_crystal(layers, 4.5)


def test_a_relaxation_that_is_not_finished_is_an_error():
    with pytest.raises(DataError, match="not relaxed after 2 steps"):
        relaxed(EMT(), ALLOY, cell="free", steps=2)


# ---------------------------------------------------------------------------------------------- commands


def _invoke(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def _refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 1, result.output
    assert len(result.output.splitlines()) == 1
    return result.output


@pytest.fixture
def crystal(tmp_path: Path) -> Path:
    """Silicon as CIF files turn it: its cubic axes aren't the Cartesian ones."""
    atoms = bulk("Si", "diamond", 5.5)
    atoms.rotate(50, (1, 1, 0.2), rotate_cell=True)
    write_structures(tmp_path / "si.extxyz", [atoms])
    return tmp_path / "si.extxyz"


def test_phonons_of_a_network(network, crystal, tmp_path):
    pytest.importorskip("phonopy")
    out = tmp_path / "out"
    text = _invoke("phonons", network, crystal, "--supercell", "2,2,2", "--relax", "cell", "--out", out)
    assert "Si2, space group Fd-3m (227)" in text
    assert "not relaxed" not in text
    assert "C11 = 1" in text
    assert "Largest uncertainty on 12 strained cells" in text
    assert "Largest uncertainty on 1 displaced structure:" in text
    names = {path.name for path in out.iterdir()}
    assert names == {"phonons.png", "phonons.npz", "elastic.txt", "phonopy.yaml", "relaxed.extxyz"}
    numbers = np.load(out / "phonons.npz")
    assert numbers["frequencies"].max() == pytest.approx(17.83, rel=0.05)
    assert f"to {numbers['frequencies'].max():.3f} THz" in text
    (atoms,) = read_structures(out / "relaxed.extxyz")
    assert atoms.get_volume() == pytest.approx(CONSTANT**3 / 4, rel=0.01)
    loose = _invoke("phonons", network / "model.pt", crystal, "--supercell", "2,2,2", "--strain", "0.05", "--out", out)
    assert "It is not relaxed in this model" in loose
    assert "The network extrapolates there" in loose


def test_a_crystal_that_the_network_has_never_seen(network, tmp_path):
    """Its uncertainty is large at rest already: strained cells are no worse."""
    write_structures(tmp_path / "bcc.extxyz", [bulk("Si", "bcc", a=3.1)])
    text = _invoke("eos", network, tmp_path / "bcc.extxyz", "--out", tmp_path / "eos", "--points", 5, "--span", 0.02)
    assert "The network does not know this crystal" in text


def test_equation_of_state_of_a_network(network, crystal, tmp_path):
    text = _invoke("eos", network, crystal, "--out", tmp_path / "eos", "--span", "0.03", "--points", 7)
    table = np.loadtxt(tmp_path / "eos" / "eos.txt")
    assert table.shape == (7, 3)
    volume = table[table[:, 1].argmin(), 0]
    assert f"V0 = {volume:.2f}"[:8] in text
    assert "does not know" not in text
    assert table[:, 2].min() > 0.0
    assert (tmp_path / "eos" / "eos.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_commands_refuse(network, crystal, tmp_path):
    basis, parameters = silicon()
    folder = tmp_path / "force_constants"
    folder.mkdir()
    basis.save(folder / "basis.npz")
    _posterior(basis, parameters).save(folder / "posterior.npz")
    assert "STRUCTURE is for networks" in _refused("phonons", folder, crystal)
    assert "--supercell is for networks" in _refused("phonons", folder, "--supercell", "2,2,2")
    assert "valid for a fixed cell only" in _refused("eos", folder, crystal)
    assert "name its crystal, as in 'ubmd phonons" in _refused("phonons", network)
    assert "--supercell 2,2: write three numbers" in _refused("phonons", network, crystal, "--supercell", "2,2")
    assert "--conductivity is for force constants" in _refused("phonons", network, crystal, "--conductivity")
    write_structures(tmp_path / "two.extxyz", [bulk("Si"), bulk("Si")])
    assert "holds 2 structures" in _refused("eos", network, tmp_path / "two.extxyz")
    write_structures(tmp_path / "slab.extxyz", [fcc111("Si", (1, 1, 4), a=5.4, vacuum=6.0)])
    assert "slab.extxyz: The structure is periodic along" in _refused("eos", network, tmp_path / "slab.extxyz")
    assert "There is no model file" in _refused("phonons", tmp_path, crystal)
