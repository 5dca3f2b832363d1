"""`ubmd.evaluate`: errors against slow formulas, frames with few or no labels, and what cannot be evaluated."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from alloy import LABELS, alloy, shaken, trained_alloy, without
from ase import Atoms
from ase.build import fcc100
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa
from scipy.stats import pearsonr, spearmanr

import ubmd
from ubmd.calculator import Model, Prediction
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import labels_of
from ubmd.data.structures import read_structures
from ubmd.errors import ArgumentError, DataError
from ubmd.measure import evaluation as module
from ubmd.potentials.evaluator import NetworkEvaluator


def slab(seed: int) -> Atoms:
    """With a stress along its surface."""
    atoms = shaken(fcc100("Cu", (2, 2, 2), vacuum=5.0), seed)
    stress = np.random.default_rng(seed).normal(size=6) * 0.01
    atoms.calc = SinglePointCalculator(atoms, **labels_of(atoms), stress=stress)
    return atoms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt and test.extxyz."""
    return trained_alloy(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def evaluator(folder: Path) -> Model:
    return Model(folder / "model.pt", "double")


def rms(values: object) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, dtype=float)))))


def test_errors_are_those_of_plain_loops(evaluator: Model) -> None:
    frames = [*(alloy(seed) for seed in range(30, 34)), alloy(40, 2), slab(1), slab(2)]
    found, predictions = ubmd.evaluate(evaluator, frames), [evaluator.predict_one(atoms) for atoms in frames]
    errors = found.errors()
    energy, force, label_force, below, largest, largest_u = [], [], [], [], [], []
    for atoms, p in zip(frames, predictions, strict=True):
        energy.append((p.energy - atoms.get_potential_energy()) / len(atoms))
        atomic = [rms(p.forces[i] - atoms.get_forces()[i]) for i in range(len(atoms))]
        force += list((p.forces - atoms.get_forces()).ravel())
        label_force += list(atoms.get_forces().ravel())
        below += [error <= u for error, u in zip(atomic, p.atomic_u, strict=True)]
        largest.append(max(atomic))
        largest_u.append(max(p.atomic_u))
    assert (errors["structures"], errors["labelled"], errors["atoms"]) == (7, 7, 16 + 8 + 16)
    assert errors["energy_rmse_meV_per_atom"] == pytest.approx(1000 * rms(energy), rel=1e-6)
    assert errors["force_mae_eV_per_A"] == pytest.approx(np.mean(np.abs(force)), rel=1e-6)
    assert errors["force_rmse_percent"] == pytest.approx(100 * rms(force) / rms(label_force), rel=1e-6)
    assert errors["force_share_below_u"] == pytest.approx(np.mean(below))
    assert errors["max_force_share_below_u"] == pytest.approx(np.mean(np.less_equal(largest, largest_u)))
    assert errors["max_force_error_eV_per_A"] == pytest.approx(max(largest), rel=1e-6)
    assert errors["max_u_median_eV_per_A"] == pytest.approx(np.median(largest_u), rel=1e-6)
    assert errors["spearman_max_u_error"] == pytest.approx(spearmanr(largest_u, largest)[0])
    assert errors["pearson_max_u_error"] == pytest.approx(pearsonr(largest_u, largest)[0], abs=1e-6)
    np.testing.assert_allclose(found.energy_error, energy, rtol=1e-6)
    np.testing.assert_allclose(found.max_force_error, largest, rtol=1e-6)


def test_the_spread_of_energies_is_that_within_a_composition(evaluator: Model) -> None:
    """Cu3Au, once doubled, is one composition; the slabs of Cu are another."""
    frames = [alloy(30), alloy(31), alloy(40, 2), slab(1), slab(2)]
    found = ubmd.evaluate(evaluator, frames)
    per_atom = [atoms.get_potential_energy() / len(atoms) for atoms in frames]
    spread = [*(np.array(per_atom[:3]) - np.mean(per_atom[:3])), *(np.array(per_atom[3:]) - np.mean(per_atom[3:]))]
    assert found.errors()["energy_rmse_percent"] == pytest.approx(100 * rms(found.energy_error) / rms(spread))
    assert found[:1].errors()["energy_rmse_percent"] is None, "one structure has no spread"


def test_stresses_of_slabs_count_along_the_surface_only(evaluator: Model) -> None:
    found = ubmd.evaluate(evaluator, [alloy(30), slab(1)])
    crystal, surface = (p.stress - labels_of(a)["stress"] for a, p in zip(found.frames, found, strict=True))
    expected = [*crystal, surface[0], surface[1], surface[5]]
    assert found.errors()["stress_rmse_MPa"] == pytest.approx(rms(expected) * 1000 / GPa, rel=1e-6)


def test_elements_groups_and_slices(folder: Path, evaluator: Model) -> None:
    found = ubmd.evaluate(evaluator, folder / "test.extxyz")
    by_element, parts = found.by_element(), found.groups("config_type")
    for element, indices, count in (("Au", [0], 6), ("Cu", [1, 2, 3], 18)):
        errors = [p.forces[indices] - a.get_forces()[indices] for a, p in zip(found.frames, found, strict=True)]
        assert by_element[element]["atoms"] == count
        assert by_element[element]["force_rmse_eV_per_A"] == pytest.approx(rms(errors))
        assert by_element[element]["mean_u_eV_per_A"] == pytest.approx(np.mean([p.atomic_u[indices] for p in found]))
    assert list(by_element) == ["Au", "Cu"]
    assert [place.number for place in parts["bulk"].places] == [1, 3, 5]
    squares = [part.errors()["force_rmse_eV_per_A"] ** 2 for part in parts.values()]  # type: ignore[operator]
    assert np.sqrt(np.mean(squares)) == pytest.approx(found.errors()["force_rmse_eV_per_A"])
    assert parts["strained"].errors()["energy_rmse_meV_per_atom"] == pytest.approx(1000 * rms(found.energy_error[::2]))
    assert found[1::2].predictions == parts["bulk"].predictions
    assert found[-1] is found.predictions[5]
    assert list(found.groups("nothing")) == ["(none)"]
    for atoms, value in zip(found.frames, (10, 2, "liquid", 2.5, 10, 2), strict=True):
        atoms.info["phase"] = value
    assert list(found.groups("phase")) == ["2", "2.5", "10", "liquid"]


def test_the_worst_atoms_are_named(evaluator: Model) -> None:
    frames = [alloy(seed) for seed in (30, 31, 32)]
    wrong = labels_of(frames[1])
    wrong["forces"] = wrong["forces"].copy()
    wrong["forces"][2] += 30.0
    frames[1].calc = SinglePointCalculator(frames[1], **wrong)
    found = ubmd.evaluate(evaluator, [*frames, without(alloy(33), "energy", "forces", "stress")])
    worst = found.worst(10)
    assert worst[0].frame == 1
    assert sorted(row.frame for row in worst) == [0, 1, 2], "only frames with forces"
    assert (worst[0].atom, worst[0].element) == (2, "Cu")
    assert worst[0].error == pytest.approx(30.0, abs=3.0)
    assert worst[0].u == found[1].atomic_u[2]
    uncertain = found.most_uncertain(2)
    assert [row.u for row in uncertain] == sorted(found.max_u, reverse=True)[:2]
    assert found.most_uncertain(4)[[row.frame for row in found.most_uncertain(4)].index(3)].error is None


def test_frames_may_lack_labels(evaluator: Model) -> None:
    whole = [alloy(seed) for seed in range(30, 34)]
    frames = [whole[0], without(whole[1], "forces", "stress"), without(whole[2], "energy"), without(whole[3], *LABELS)]
    found = ubmd.evaluate(evaluator, frames)
    assert found.labelled.tolist() == [True, True, True, False]
    assert np.isnan(found.energy_error).tolist() == [False, False, True, True]
    assert np.isnan(found.max_force_error).tolist() == [False, True, False, True]
    complete, errors = ubmd.evaluate(evaluator, whole), found.errors()
    np.testing.assert_array_equal(found.max_u, complete.max_u)
    assert errors["energy_rmse_meV_per_atom"] == pytest.approx(1000 * rms(complete.energy_error[:2]))
    forces = complete.select([0, 2]).errors()["force_rmse_eV_per_A"]
    assert errors["force_rmse_eV_per_A"] == pytest.approx(forces)
    none = found[3:].errors()
    assert none["energy_rmse_meV_per_atom"] is none["force_share_below_u"] is none["spearman_max_u_error"] is None
    assert none["max_u_largest_eV_per_A"] == found.max_u[3]
    json.dumps([errors, none, found.by_element()], allow_nan=False)


def test_nothing_one_atom_and_one_structure(evaluator: Model) -> None:
    nothing = ubmd.evaluate(evaluator, [])
    assert (len(nothing), nothing.energy.shape, nothing.as_atoms(), nothing.worst()) == (0, (0,), [], [])
    assert {value for key, value in nothing.errors().items() if key not in ("structures", "labelled", "atoms")} == {
        None
    }
    assert repr(nothing) == "<Evaluation: 0 structures, 0 labelled>"
    alone = ubmd.evaluate(evaluator, Atoms("Cu"))
    assert alone[0].stress is None
    assert alone[0].forces.tolist() == [[0.0, 0.0, 0.0]]
    iterated = ubmd.evaluate(evaluator, (atoms for atoms in [alloy(30), Atoms("Au2", [[0, 0, 0], [2.6, 0, 0]])]))
    assert iterated.u.shape == iterated.max_u.shape == (2,)


def test_batches_change_nothing_and_are_reported(evaluator: Model) -> None:
    frames = [alloy(30), alloy(40, 2), alloy(31), Atoms("Cu"), alloy(32)]
    reports: list[tuple[int, int]] = []
    one = ubmd.evaluate(evaluator, frames, batch=8, report=lambda *counts: reports.append(counts))
    assert reports == [(2, 5), (5, 5)]
    np.testing.assert_allclose(one.energy, ubmd.evaluate(evaluator, frames).energy, rtol=1e-12)


def test_predictions_as_atoms_survive_a_file(evaluator: Model, folder: Path, tmp_path: Path) -> None:
    found = ubmd.evaluate(evaluator, folder / "test.extxyz")
    ase.io.write(tmp_path / "ase.extxyz", found.as_atoms())
    write_structures(tmp_path / "own.extxyz", found.as_atoms())
    for name in ("ase", "own"):
        for k, atoms in enumerate(ase.io.read(tmp_path / f"{name}.extxyz", ":")):
            assert atoms.get_potential_energy() == pytest.approx(found[k].energy)
            np.testing.assert_allclose(atoms.get_forces(), found[k].forces, atol=1e-7)
            np.testing.assert_allclose(atoms.get_stress(), found[k].stress, atol=1e-7)
            np.testing.assert_allclose(atoms.arrays["atomic_uncertainty"], found[k].atomic_u, atol=1e-7)
            assert (atoms.info["source_frame"], atoms.info["uncertainty"]) == (k, pytest.approx(found[k].u))
    mapping = {name: f"REF_{name}" for name in LABELS}
    for atoms, label in zip(read_structures(tmp_path / "own.extxyz", mapping), found.frames, strict=True):
        for name, value in labels_of(label).items():
            np.testing.assert_allclose(labels_of(atoms)[name], value, rtol=1e-12, atol=1e-15)
    assert found.frames[0].calc.results.keys() == set(LABELS), "the frames keep their labels"


def test_labels_under_the_names_of_other_packages(evaluator: Model) -> None:
    atoms = alloy(30)
    other = without(atoms, *LABELS)
    other.info["REF_energy"] = atoms.get_potential_energy() / 27.211386245981
    other.arrays["REF_forces"] = atoms.get_forces()
    errors = ubmd.evaluate(evaluator, other, labels={"energy": "REF_energy:Ha"}).errors()
    expected = ubmd.evaluate(evaluator, atoms).errors()
    for key in ("energy_rmse_meV_per_atom", "force_rmse_eV_per_A"):
        assert errors[key] == pytest.approx(expected[key], rel=1e-6)


def test_what_cannot_be_evaluated_is_named(evaluator: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [alloy(seed) for seed in range(30, 34)]
    with pytest.raises(DataError, match=r"^structure 2: the model does not know Ni, only .*Cu.*; remove the frame, or"):
        ubmd.evaluate(evaluator, [*good[:2], Atoms("NiCu", [[0, 0, 0], [2.5, 0, 0]])])
    left = ubmd.evaluate(evaluator, [Atoms("Ni"), *good], skip_unknown=True)
    assert ([place.number for place in left.places], [place.number for place in left.skipped]) == ([1, 2, 3, 4], [0])
    moved = alloy(30)
    moved.positions[0] += 0.1
    with pytest.raises(DataError, match=r"^structure 1: the labels are out of date: positions changed"):
        ubmd.evaluate(evaluator, [good[0], moved])
    together = Atoms("Cu2", [[0, 0, 0], [0, 0, 0]])
    with pytest.raises(DataError, match=r"^structure 3: atoms 0 \(Cu\) and 1 \(Cu\), counted from 0, are at the same"):
        ubmd.evaluate(evaluator, [*good[:3], together], batch=4)
    with pytest.raises(ArgumentError, match=r"^Structure 0 is a str, not ase.Atoms"):
        ubmd.evaluate(evaluator, ["test.extxyz"])  # type: ignore[list-item]
    honest = NetworkEvaluator.predict

    def picky(self: NetworkEvaluator, structures: list[Atoms]) -> list[Prediction]:
        """Fails as a potential may that is valid for some boxes only: without saying for which structure."""
        if any(np.array_equal(atoms.positions, good[3].positions) for atoms in structures):
            raise DataError("this box does not hold the crystal.")
        return honest(self, structures)

    monkeypatch.setattr(NetworkEvaluator, "predict", picky)
    with pytest.raises(DataError, match=r"^structure 3: this box does not hold the crystal\.$"):
        ubmd.evaluate(evaluator, good, batch=8)


def test_the_examples_of_the_docstrings_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = {"found": ubmd.evaluate("model.pt", "test.extxyz"), "evaluate": ubmd.evaluate}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = [test for test in doctest.DocTestFinder().find(module, globs=vars(module) | names) if test.examples]
    assert {test.name.rpartition(".")[2] for test in tests} == {"evaluate", "groups", "worst"}
    for test in tests:
        assert runner.run(test).failed == 0
