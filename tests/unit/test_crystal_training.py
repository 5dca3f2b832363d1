"""`ubmd train` with [crystal] on Stillinger-Weber silicon, labelled by LAMMPS."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from ubmd.calculator import Model
from ubmd.cli.train import register
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.measure.evaluation import evaluate
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.fit import (
    Errors,
    cached_basis,
    calibrated_energies,
    calibrated_forces,
    errors_of,
    fit_crystal,
    frames,
)
from ubmd.potentials.force_constants.lattice import Lattice
from ubmd.potentials.force_constants.potential import load_potential
from ubmd.potentials.force_constants.regression import NormalEquations, Posterior, fit
from ubmd.references.lammps import LAMMPS
from ubmd.settings import CrystalSettings, UncertaintySettings

pytest.importorskip("spglib")

A0 = 5.431
CUTOFFS = {2: 4.0, 3: 4.0, 4: 2.5}
BOX = np.array([[-2, 2, 2], [2, -2, 2], [2, 2, -2]])
SETTINGS = """
training_file = "training.extxyz"
validation_file = "validation.extxyz"
output_dir = "{output}"
[crystal]
structure = "ideal.extxyz"
cutoffs = {{2 = 4.0, 3 = 4.0, 4 = 2.5}}
[uncertainty]
alpha = 0.1
"""


def ubmd(*arguments: object) -> tuple[int, str, str]:
    """Run a command; exit code, stdout, stderr."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def silicon() -> Atoms:
    return bulk("Si", "diamond", A0)


@pytest.fixture(scope="module")
def reference():
    calculator = LAMMPS(["pair_style sw", "pair_coeff * * Si.sw Si"], ["Si"])
    yield calculator
    calculator.close()


def labelled(atoms: Atoms, reference: LAMMPS) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = reference
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


@pytest.fixture(scope="module")
def data(tmp_path_factory, reference) -> Path:
    """Files of the unlabelled ideal crystal, training (4, one turned), validation (6) and test structures (3)."""
    folder = tmp_path_factory.mktemp("silicon")
    rng = np.random.default_rng(7)
    box = make_supercell(silicon(), BOX)

    def rattled(count: int) -> list[Atoms]:
        structures = []
        for _ in range(count):
            atoms = box.copy()
            atoms.positions += 0.06 * rng.standard_normal((len(atoms), 3))
            structures.append(labelled(atoms, reference))
        return structures

    training = rattled(4)
    turned = training[1].copy()
    turned.rotate(40.0, (1, 1, 0.3), rotate_cell=True)
    training[1] = labelled(turned, reference)
    for name, structures in {"training": training, "validation": rattled(6), "test": rattled(3)}.items():
        write_structures(folder / f"{name}.extxyz", structures)
    write_structures(folder / "ideal.extxyz", [silicon()])
    return folder


def settings(data: Path, output: Path, **changes: str) -> Path:
    text = SETTINGS.format(output=output)
    for old, new in changes.items():
        text = text.replace(*{"energies": ("[uncertainty]", "energies = true\n[uncertainty]")}.get(old, (old, new)))
    path = data / f"{output.name}.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, str]:
    """Output folder and what the command printed."""
    output = tmp_path_factory.mktemp("trained") / "fit"
    code, text, error = ubmd("train", settings(data, output))
    assert (code, error) == (0, "")
    return output, text


def test_the_promise_of_the_calibration_is_printed(trained):
    _, text = trained
    assert "in new structures like these, on average at least" in text
    assert "and about 90 % of atoms have a force error below u_i." in text


def test_errors_on_a_test_set(trained, data):
    """Independent of the training code: labels of LAMMPS against the file."""
    output, _ = trained
    structures = read_structures(data / "test.extxyz", labelled=True)
    result = evaluate(output / "model.pt", structures).errors()
    rms = np.sqrt(np.mean([atoms.get_forces() ** 2 for atoms in structures]))
    assert rms > 0.5
    assert result["force_rmse_eV_per_A"] < 0.05 * rms
    assert result["energy_rmse_meV_per_atom"] < 0.5
    assert result["force_share_below_u"] > 0.8
    energies = [atoms.get_potential_energy() for atoms in structures]
    assert np.std(energies) / len(structures[0]) > 0.002


def test_stress_is_that_of_the_reference(trained, data, reference):
    """No stress was trained on: cubic terms give that of thermal displacements, harmonic ones that of optical modes."""
    output, _ = trained
    evaluator = Model(output / "model.pt")
    optical = silicon()
    optical.positions[1] += [0.0, 0.05, 0.02]
    structures = [*read_structures(data / "test.extxyz"), optical]
    ideal, expected, found = silicon(), [], []
    ideal.calc = reference
    start = ideal.get_stress()
    for atoms in structures:
        moved = atoms.copy()
        moved.calc = reference
        expected.append(moved.get_stress() - start)
        found.append(evaluator.predict_one(atoms).stress)
    assert np.abs(np.array(expected)[:3, :3]).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("matrix", [BOX, [[2, 1, 0], [0, 3, 1], [1, 0, 3]], np.diag([2, 1, 1]) @ BOX])
def test_lammps_says_the_same(trained, matrix):
    """The plugin finds the sites of boxes by its own code; LAMMPS turns the skewed one, and all are shifted."""
    path = trained[0] / "model.pt"
    plugin = LAMMPS(["pair_style ubmd precision double", f"pair_coeff * * {path} Si"], ["Si"])
    atoms = make_supercell(silicon(), matrix)
    atoms.positions += 0.06 * np.random.default_rng(0).standard_normal((len(atoms), 3)) + [1.0, 2.0, 3.0]
    here = Model(path).predict_one(atoms)
    atoms.calc = plugin
    assert here.energy == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(here.forces, atoms.get_forces(), atol=1e-11)
    np.testing.assert_allclose(here.stress, atoms.get_stress(), atol=1e-14)
    plugin.close()


@pytest.mark.parametrize("count", [3, 6])
def test_a_teacher_is_learnt_and_errors_are_as_large_as_expected(trained, count):
    """Labels by a potential of the same form, with noise: the model is well specified, so its z-score is 1."""
    output, _ = trained
    basis, teacher = ClusterBasis.load(output / "basis.npz"), Posterior.load(output / "posterior.npz").mean
    rng = np.random.default_rng(count)
    box = basis.supercell(make_supercell(silicon(), BOX))
    noise = 0.005

    def labelled_by_teacher() -> Atoms:
        u = 0.08 * rng.standard_normal((len(box), 3))
        forces = basis.forces(teacher, u, box) + noise * rng.standard_normal((len(box), 3))
        atoms = Atoms(basis.lattice.numbers[box.sublattice], box.ideal + u, cell=box.cell, pbc=True)
        atoms.calc = SinglePointCalculator(atoms, forces=forces)
        return atoms

    training, validation, fresh = ([labelled_by_teacher() for _ in range(n)] for n in (count, 8, 8))
    crystal = CrystalSettings(structure=Path("unused"), cutoffs=CUTOFFS)
    result = fit_crystal(basis, training, validation, crystal, UncertaintySettings(alpha=0.1))
    assert result.posterior.noise == pytest.approx(noise, rel=0.1)
    assert result.validation.z_score(result.posterior.noise) == pytest.approx(1.0, abs=0.1)
    assert result.validation.force_rmse < 2.0 * noise
    later = errors_of(basis, result.posterior, frames(basis.lattice, fresh), 0.0)
    assert 0.84 < np.mean(later.atom_error <= result.force_scale.scale * later.atom_deviation) < 0.96
    # without the noise the epistemic deviation alone has to account for the errors
    exact = [
        replace(frame, forces=basis.forces(teacher, frame.displacements, frame.supercell))
        for frame in frames(basis.lattice, validation)
    ]
    assert errors_of(basis, result.posterior, exact, 0.0).z_score(0.0) == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize("by", ["atom", "structure"])
def test_conformal_factors_cover_fresh_structures(by):
    """Deviations that are ten times too small are made to cover 90 % of errors, of atoms or of structures' maxima."""
    rng = np.random.default_rng(3)
    settings = UncertaintySettings(alpha=0.1, atoms_by=by)

    def errors(count: int) -> Errors:
        deviations = np.exp(rng.normal(-3.0, 1.0, (count, 1, 1))) * rng.uniform(0.5, 1.0, (count, 5, 3))
        forces = 10.0 * deviations * rng.standard_normal((count, 5, 3))
        energy_u = rng.uniform(0.1, 1.0, count)
        return Errors(
            forces.reshape(-1, 3),
            deviations.reshape(-1, 3),
            1.0,
            np.full(count, 5),
            10.0 * energy_u * rng.standard_normal(count),
            energy_u,
            np.full(count, 5),
        )

    held_out, fresh = errors(200), errors(400)
    scale = calibrated_forces(held_out, settings)
    assert scale.count == (200 if by == "structure" else 1000)
    assert 8.0 < scale.scale < 30.0
    error, u = fresh.atom_error, fresh.atom_deviation
    if by == "structure":
        np.testing.assert_array_equal(fresh.largest(u), u.reshape(-1, 5).max(1))
        error, u = fresh.largest(error), fresh.largest(u)
    assert np.mean(error <= scale.scale * u) == pytest.approx(0.9, abs=0.05)
    energies = calibrated_energies(held_out, settings)
    assert energies is not None
    covered = np.abs(fresh.energies) <= energies.scale * fresh.energy_deviations
    assert np.mean(covered) == pytest.approx(0.9, abs=0.06)


def test_what_is_printed(trained):
    output, text = trained
    summary = json.loads((output / "fit.json").read_text())
    assert "training set" in text
    assert "cluster basis:" in text
    assert "noise or truncation of the forces" in text
    assert f"{summary['validation_force_rmse_eV_per_A']:.4g}" in text
    assert f"{summary['z_score']:.3g}" in text
    assert "at 90 % confidence" in text
    assert "model.pt" in text
    assert (output / "uncertainty.png").stat().st_size > 10_000


def test_the_fit_is_that_of_the_basis_and_the_regression(trained, data):
    output, _ = trained
    basis = ClusterBasis.build(silicon(), CUTOFFS)
    equations = NormalEquations(basis.parameter_orders)
    structures = read_structures(data / "training.extxyz")
    box = basis.supercell(structures[0])
    for atoms in structures[:1] + structures[2:]:
        equations.add(basis.force_matrix(atoms, box), atoms.get_forces())
    # the turned structure by hand
    atoms = structures[1].copy()
    forces = structures[1].get_forces()
    rotation = Rotation.align_vectors(np.array(box.cell), np.array(atoms.cell))[0].as_matrix()
    atoms = Atoms(atoms.numbers, atoms.positions @ rotation.T, cell=box.cell, pbc=True)
    equations.add(basis.force_matrix(atoms, box), forces @ rotation.T)
    posterior = fit(equations)
    stored = Posterior.load(output / "posterior.npz")
    np.testing.assert_allclose(stored.mean, posterior.mean, rtol=1e-5, atol=1e-6 * np.abs(posterior.mean).max())
    assert stored.noise == pytest.approx(posterior.noise, rel=1e-5)
    metadata = Model(output / "model.pt").metadata
    assert metadata["training_set_hash"] == dataset_hash(structures)
    assert metadata["n_training"] == 4
    assert metadata["settings"]["crystal"]["cutoffs"] == {"2": 4.0, "3": 4.0, "4": 2.5}
    assert metadata["settings"]["uncertainty"] == {"alpha": 0.1, "atoms_by": "atom"}
    assert "model" not in metadata["settings"]
    assert metadata["regression"]["noise"]["forces"] == pytest.approx(posterior.noise, rel=1e-5)


def test_energy_of_the_ideal_crystal(trained, reference):
    """It is not in the data: what the forces leave of the training energies gives it."""
    output, _ = trained
    ideal = labelled(silicon(), reference)
    found = Model(output / "model.pt").predict_one(silicon()).energy
    assert found == pytest.approx(ideal.get_potential_energy(), abs=0.01)
    assert found == json.loads((output / "fit.json").read_text())["ideal_energy_eV_per_cell"]


def test_calibration_holds_on_the_validation_set(trained, data):
    output, _ = trained
    structures = read_structures(data / "validation.extxyz", labelled=True)
    evaluator = Model(output / "model.pt")
    result = evaluate(evaluator, structures).errors()
    n = len(structures) * len(structures[0])
    assert result["force_share_below_u"] == pytest.approx(np.ceil(0.9 * (n + 1)) / n, abs=1.5 / n)  # u_i at its error
    record = evaluator.metadata["uncertainty"]
    assert record["alpha"] == 0.1
    assert record["forces"]["n_calibration"] == n
    assert record["energy"]["n_calibration"] == len(structures)
    assert record["energy"]["attainable"] == pytest.approx(6 / 7)
    assert result["energy_share_below_u"] >= 5 / 6  # the largest ratio itself is on the edge
    by_structure = UncertaintySettings(alpha=0.1, atoms_by="structure")
    basis, posterior = ClusterBasis.load(output / "basis.npz"), Posterior.load(output / "posterior.npz")
    errors = errors_of(basis, posterior, frames(basis.lattice, structures), 0.0)
    scale = calibrated_forces(errors, by_structure)
    assert scale.count == len(structures)
    ratios = [
        np.sqrt(np.mean((p.forces - atoms.get_forces()) ** 2, axis=1)).max() / p.atomic_u.max()
        for p, atoms in zip(evaluator.predict(structures), structures, strict=True)
    ]
    assert scale.scale == pytest.approx(record["forces"]["scale"] * max(ratios), rel=1e-4)


@pytest.mark.parametrize("direction", [(1.0, 1.0, 1.0), (-1.0, -1.0, -1.0), (1.0, 0.0, 0.0), (0.3, -0.8, 0.5)])
def test_an_atom_that_is_pulled_away_never_looks_certain(trained, data, direction):
    """As of networks (tests/learning/test_bond_scan.py); beyond the displacement limit, a structure is refused."""
    evaluator = Model(trained[0] / "model.pt")
    known = [p.atomic_u.max() for p in evaluator.predict(read_structures(data / "validation.extxyz"))]
    limit, values = evaluator.metadata["lattice"]["max_displacement"], []
    for length in np.linspace(0.4, 0.99 * limit, 8):  # labels have 0.06 Å per component
        atoms = make_supercell(silicon(), BOX)
        atoms.positions[0] += length * np.array(direction) / np.linalg.norm(direction)
        values.append(evaluator.predict_one(atoms).atomic_u.max())
    assert min(values) > 2.0 * max(known)
    assert (np.diff(values) > 0.0).all()


def test_shares_of_the_orders_are_those_of_their_forces(trained, data):
    output, _ = trained
    summary = json.loads((output / "fit.json").read_text())
    basis, posterior = ClusterBasis.load(output / "basis.npz"), Posterior.load(output / "posterior.npz")
    parts = list(frames(basis.lattice, read_structures(data / "training.extxyz")))
    labels = np.sum([np.sum(frame.forces**2) for frame in parts])
    for order in (2, 3, 4):
        theta = np.where(basis.parameter_orders == order, posterior.mean, 0.0)
        own = np.sum([np.sum(basis.forces(theta, f.displacements, f.supercell) ** 2) for f in parts])
        assert summary["order_shares"][str(order)] == pytest.approx(np.sqrt(own / labels), rel=1e-6)
    assert summary["order_shares"]["2"] > 0.9
    assert summary["order_shares"]["3"] > summary["order_shares"]["4"] > 0.0


def test_energies_may_be_fitted_too(data, tmp_path, reference):
    write_structures(data / "labelled_ideal.extxyz", [labelled(silicon(), reference)])
    path = settings(data, tmp_path / "energies", energies="")
    overrides = ("--set", "crystal.structure=labelled_ideal.extxyz")
    assert ubmd("train", path, *overrides)[0] == 0
    equations = NormalEquations.load(tmp_path / "energies" / "equations.npz")
    assert equations.sums["energies"].structures == 4
    ideal = labelled(silicon(), reference).get_potential_energy()
    assert Model(tmp_path / "energies" / "model.pt").predict_one(silicon()).energy == pytest.approx(ideal, abs=1e-12)
    # without the label, from the energies themselves
    assert ubmd("train", path, "--set", f"output_dir={tmp_path / 'unknown'}")[0] == 0
    found = json.loads((tmp_path / "unknown" / "fit.json").read_text())["ideal_energy_eV_per_cell"]
    assert found == pytest.approx(ideal, abs=0.01)


def test_info_and_eval(trained, data):
    output, _ = trained
    code, text, _ = ubmd("info", output / "model.pt")
    assert code == 0
    for part in ("force constants of a crystal", "2 atoms: Si Si", "0.941 Å", "parameters by order", "eV/Å^order"):
        assert part in text
    assert "sites" not in text.replace("sites.", "")
    code, text, _ = ubmd("info", output / "model.pt", "--json")
    assert json.loads(text)["kind"] == "force constants"
    code, text, _ = ubmd("eval", output / "model.pt", data / "test.extxyz", "--json")
    assert code == 0
    assert json.loads(text)["stress_rmse_MPa"] is None
    code, text, _ = ubmd("eval", output / "model.pt", data / "test.extxyz")
    assert "forces 90 %" in text
    assert "do not include that of the ideal crystal" not in text
    structures = read_structures(data / "test.extxyz")
    for atoms in structures:
        atoms.calc.results["stress"] = np.zeros(6)
    write_structures(data / "stresses.extxyz", structures)
    code, text, _ = ubmd("eval", output / "model.pt", data / "stresses.extxyz")
    assert code == 0
    assert "do not include that of the ideal crystal" in text


def test_a_rounded_crystal_trains_the_same_potential_within_a_tolerance(trained, data, tmp_path):
    """A primitive cell in a general orientation with 4 decimals: 1.5e-4 Å off, and without symmetry but inversion."""
    ideal = silicon()
    ideal.rotate(40.0, (1, 2, 3), rotate_cell=True)
    ideal = Atoms(ideal.numbers, np.round(ideal.positions, 4), cell=np.round(ideal.cell[:], 4), pbc=True)
    write_structures(tmp_path / "rounded.extxyz", [ideal])
    change = ["--set", f"crystal.structure={tmp_path / 'rounded.extxyz'}", "--set", "crystal.cutoffs={2=4.0,3=2.5}"]
    path = settings(data, tmp_path / "out")
    code, text, _ = ubmd("train", path, *change)
    assert code == 0
    assert "Space group P-1 (2), 2 operations, 2 atoms in the primitive cell." in text
    assert "With crystal.tolerance = 0.001 (Å) it is Fd-3m (227), 48 operations" in text
    few = {}
    for name, options in {"exact": change[2:], "rounded": [*change, "--set", "crystal.tolerance=1e-3"]}.items():
        code, text, _ = ubmd("train", settings(data, tmp_path / name), *options)
        assert code == 0
        assert "Space group Fd-3m (227), 48 operations, 2 atoms in the primitive cell." in text
        assert ("To make that exact, atoms were moved by at most" in text) == (name == "rounded")
        few[name] = Model(tmp_path / name / "model.pt")
        assert few[name].metadata["space_group"] == "Fd-3m (227), 48 operations"
    assert few["exact"].metadata["parameters"] == few["rounded"].metadata["parameters"]
    for atoms in read_structures(data / "test.extxyz"):
        one, other = (evaluator.predict_one(atoms).forces for evaluator in few.values())
        # the box of the labels is not quite a multiple of the rounded cell
        assert np.abs(one - other).max() < 2e-3 * np.abs(one).max()
    code, text, _ = ubmd("info", tmp_path / "rounded" / "model.pt")
    assert "Fd-3m (227), 48 operations" in text


def test_the_basis_is_kept(data, tmp_path, monkeypatch):
    path = tmp_path / "basis.npz"
    first = cached_basis(silicon(), CUTOFFS, path)
    built: list[int] = []
    original = ClusterBasis.build
    monkeypatch.setattr(ClusterBasis, "build", lambda *a, **k: (built.append(1), original(*a, **k))[1])
    again = cached_basis(silicon(), CUTOFFS, path)
    np.testing.assert_array_equal(first.parts[1].parameters, again.parts[1].parameters)
    assert built == []
    assert cached_basis(silicon(), {2: 4.0}, path).orders == [2]
    assert cached_basis(bulk("Si", "diamond", 5.5), {2: 4.0}, path).lattice.cell[0, 1] == pytest.approx(2.75)
    path.write_bytes(b"damaged")
    assert cached_basis(silicon(), {2: 4.0}, path).orders == [2]
    assert len(built) == 3
    assert cached_basis(silicon(), {2: 4.0}, path, 1.5).decay == 1.5
    assert cached_basis(silicon(), {2: 4.0}, path, 1.5).decay == 1.5
    assert len(built) == 4


def test_mistakes(data, tmp_path, reference):
    lattice = Lattice.from_atoms(silicon())
    with pytest.raises(DataError, match="training structure 0: no forces; label it or remove it"):
        list(frames(lattice, [silicon()], "training structure"))
    strained = bulk("Si", "diamond", 5.5)
    with pytest.raises(DataError, match="structure 1: The box is not an integer multiple"):
        list(frames(lattice, [labelled(silicon(), reference), labelled(strained, reference)]))
    path = settings(data, tmp_path / "out")
    code, _, error = ubmd("train", path, "--set", "crystal.structure=training.extxyz")
    assert code == 1
    assert "holds 4 structures; crystal.structure must be the ideal crystal alone" in error
    code, _, error = ubmd("train", path, "--set", "crystal.structure=nothing.extxyz")
    assert (code, error.count("\n")) == (1, 1)
    assert "There is no file" in error
    unlabelled = [atoms.copy() for atoms in read_structures(data / "training.extxyz")]
    for atoms, source in zip(unlabelled, read_structures(data / "training.extxyz"), strict=True):
        atoms.calc = SinglePointCalculator(atoms, forces=source.get_forces())
    write_structures(data / "forces.extxyz", unlabelled)
    overrides = ("--set", "training_file=forces.extxyz", "--set", "crystal.energies=true")
    code, _, error = ubmd("train", path, *overrides)
    assert code == 1
    assert "no energy; label it, or set crystal.energies = false" in error


def test_forces_alone_are_enough(data, tmp_path):
    structures = read_structures(data / "training.extxyz")
    for atoms in structures:
        atoms.calc = SinglePointCalculator(atoms, forces=atoms.get_forces())
    write_structures(data / "only_forces.extxyz", structures)
    path = settings(data, tmp_path / "out", **{'validation_file = "validation.extxyz"': "validation_share = 0.5"})
    code, text, error = ubmd("train", path, "--set", "training_file=only_forces.extxyz")
    assert (code, error) == (0, "")
    assert "energy of the ideal crystal" not in text
    record = Model(tmp_path / "out" / "model.pt").metadata["uncertainty"]
    assert record["energy"]["n_calibration"] == 0
    assert record["energy"]["scale"] == record["forces"]["scale"]


SNSE = Path(__file__).parents[2] / "lammps_examples" / "snse"
SOFT = """
training_file = "{labels}/dynamic_seed0.extxyz.xz"
validation_file = "{labels}/test_300K.extxyz.xz"
output_dir = "{output}"
[crystal]
structure = "{labels}/../snse.extxyz"
cutoffs = {{2 = 6.7}}
{options}
"""


def test_training_says_that_larger_boxes_are_unstable_and_what_to_set(tmp_path):
    """Tin selenide: the second order alone has negative curvature; with crystal.stable it has none."""
    said = {}
    for name, options in (("plain", ""), ("stable", "pairs = 5.2\nstable = true")):
        text = SOFT.format(labels=SNSE / "labels", output=tmp_path / name, options=options)
        (tmp_path / f"{name}.toml").write_text(text)
        code, said[name], err = ubmd("train", tmp_path / f"{name}.toml")
        assert code == 0, err
    assert "the ideal crystal is unstable in boxes larger than that of the labels" in said["plain"]
    assert "set crystal.stable = true" in said["plain"]
    assert "crystal.stable:" in said["stable"]
    assert "unstable" not in said["stable"]
    assert "pairs" in said["stable"]
    summary = json.loads((tmp_path / "stable" / "fit.json").read_text())
    cost = summary["constraint"]
    assert cost["rows"] > 0 > cost["lowest"]
    assert cost["training_force_rmse"] <= summary["training_force_rmse_eV_per_A"]
    assert cost["validation_force_rmse"] != summary["validation_force_rmse_eV_per_A"]
    basis, theta = load_potential(tmp_path / "stable")
    box = basis.supercell(read_structures(SNSE / "labels" / "test_300K.extxyz.xz")[0])
    constants = basis.force_constants(theta, 2, box).transpose(0, 2, 1, 3).reshape(96, 96)
    assert np.linalg.eigvalsh(constants)[0] > -1e-8
