"""Every kind of uncertainty through its model file: naive oracles, derivatives, symmetries, precision."""

import copy
import json
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from small_model import ELEMENTS, SETTINGS, central, labelled, results_of, triclinic

from ubmd.calculator import Calculator, Model, Prediction
from ubmd.data.graph import build_graph, collate
from ubmd.errors import ModelError
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.sketch import LastLayerSketch
from ubmd.settings import UncertaintySettings
from ubmd.uncertainty import conformal_scale

KINDS = ["last-layer", "distance", "ensemble"]
TRAINING = [labelled(molecule("CH3CONH2"), k) for k in range(5)]
CALIBRATION = [labelled(molecule("CH3CONH2"), k) for k in range(5, 9)]


def settings_of(kind: str) -> UncertaintySettings:
    return UncertaintySettings(kind=kind, projections=16, references=20, seed=3, alpha=0.3, by_element=False)


def network(seed: int) -> GaussianMomentNetwork:
    model = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=seed)
    with torch.no_grad():
        model.scale.copy_(torch.tensor([1.1, 0.8, 1.3, 0.9], dtype=torch.float64))
        model.constant.fill_(0.7)
        model.shift.copy_(torch.linspace(-1.0, 2.0, 4) + 0.1 * seed)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        settings = settings_of(kind)
        models = [network(3 + m) for m in range(settings.networks)]
        export_model(models, TRAINING, CALIBRATION, settings, folder / f"{kind}.pt")
    return {kind: folder / f"{kind}.pt" for kind in KINDS}


def atomic_features(evaluator: Model, atoms: Atoms) -> np.ndarray:
    graph = build_graph(atoms, evaluator.elements, evaluator.cutoff)
    with torch.no_grad():
        return evaluator.module(graph.species, graph.edge_index, graph.edge_vector, len(atoms))[1].numpy()


# ------------------------------------------------------------------------------------------ oracles


def test_last_layer_sketch_is_the_third_term() -> None:
    """phi_i = delta^3 P (x^2 / sqrt(d_2), 0.1), with P from the same generator."""
    sketch = LastLayerSketch(6, 4, seed=2)
    projection = torch.randn(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, delta = np.random.default_rng(0).normal(size=(3, 6)), np.array([0.5, -2.0, 1.0])
    expected = [d * projection.numpy() @ [*(row / np.sqrt(6)), 0.1] for row, d in zip(x, delta, strict=True)]
    phi = sketch(torch.from_numpy(x), torch.from_numpy(delta).unsqueeze(1))
    np.testing.assert_allclose(phi.detach().numpy(), expected, rtol=1e-12)


def posterior(features: np.ndarray, tests: np.ndarray) -> np.ndarray:
    """sqrt(lambda^2 t (Phi^T Phi + lambda^2)^-1 t), by an explicit inverse."""
    scale = np.sqrt(np.mean([f @ f for f in features]))
    f, t = features / scale, tests / scale
    inverse = np.linalg.inv(f.T @ f + 1e-4 * np.eye(f.shape[1]))
    return np.sqrt(1e-4 * np.einsum("sp,pq,sq->s", t, inverse, t))


def distance(features: np.ndarray, tests: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.mean([f @ f for f in features]))
    return np.array([max(min(np.sum((t - f) ** 2) for f in features) / scale**2, 1e-8) ** 0.5 for t in tests])


ORACLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"last-layer": posterior, "distance": distance}


@pytest.mark.parametrize("kind", ORACLES)
def test_structure_uncertainties_and_their_calibration(files: dict[str, Path], kind: str) -> None:
    """u of the file = conformal factor times the naive definition from the file's own features."""
    evaluator = Model(files[kind], "double")
    means = np.array([atomic_features(evaluator, atoms).mean(0) for atoms in TRAINING])
    calibration = np.array([atomic_features(evaluator, atoms).mean(0) for atoms in CALIBRATION])
    predictions = evaluator.predict(CALIBRATION)
    errors = [(p.energy - a.get_potential_energy()) / len(a) for p, a in zip(predictions, CALIBRATION, strict=True)]
    raw = ORACLES[kind](means, calibration)
    scale = conformal_scale(errors, raw, 0.3).scale
    np.testing.assert_allclose([p.u for p in predictions], scale * raw, rtol=1e-8)
    assert json.loads(evaluator.module.metadata())["uncertainty"]["energy"]["scale"] == pytest.approx(scale, rel=1e-8)
    new = triclinic()
    raw = ORACLES[kind](means, atomic_features(evaluator, new).mean(0, keepdims=True))
    assert evaluator.predict_one(new).u == pytest.approx(scale * raw[0], rel=1e-8)


def test_atomic_distances_use_far_features_of_the_training_set(files: dict[str, Path]) -> None:
    evaluator = Model(files["distance"], "double")
    training = np.concatenate([atomic_features(evaluator, atoms) for atoms in TRAINING])
    scale = np.sqrt(np.mean([f @ f for f in training]))
    kept = evaluator.module.atom_uncertainty.references.numpy()
    assert len(kept) == 20
    assert all(min(np.abs(training / scale - row).max(1)) < 1e-12 for row in kept)
    new = triclinic()
    raw = [min(np.linalg.norm(f / scale - row) for row in kept) for f in atomic_features(evaluator, new)]
    factor = evaluator.metadata["uncertainty"]["forces"]["scale"]
    np.testing.assert_allclose(evaluator.predict_one(new).atomic_u, factor * np.array(raw), rtol=1e-10)


def energy_and_forces(model: GaussianMomentNetwork, atoms: Atoms) -> tuple[float, np.ndarray]:
    """By the trainable model."""
    model.to_network_dtype(torch.float64)
    energy, forces, _ = model.energy_forces_virial(collate([build_graph(atoms, ELEMENTS, model.cutoff)]))
    return float(energy.detach()), forces.detach().numpy()


@pytest.mark.parametrize("atoms", [molecule("CH3CONH2"), triclinic()], ids=["molecule", "cell"])
def test_ensemble_uncertainties_are_spreads_of_separate_models(files: dict[str, Path], atoms: Atoms) -> None:
    """u = std of E/n, u_i = sqrt(mean over xyz of Var F_i), population variances, times the calibration."""
    evaluator = Model(files["ensemble"], "double")
    factors = evaluator.metadata["uncertainty"]
    results = [energy_and_forces(network(3 + m), atoms) for m in range(3)]
    prediction = evaluator.predict_one(atoms)
    spread = np.std([energy for energy, _ in results]) / len(atoms)
    assert prediction.u == pytest.approx(factors["energy"]["scale"] * spread, rel=1e-9)
    atomic = np.sqrt(np.var([forces for _, forces in results], axis=0).mean(1))
    np.testing.assert_allclose(prediction.atomic_u, factors["forces"]["scale"] * atomic, rtol=1e-9)


def test_ensemble_is_calibrated_on_its_own_errors(files: dict[str, Path]) -> None:
    scales = json.loads(Model(files["ensemble"]).module.metadata())["uncertainty"]
    energy_errors, energy_u, force_errors, force_u = [], [], [], []
    for atoms in CALIBRATION:
        energies, forces = zip(*[energy_and_forces(network(3 + m), atoms) for m in range(3)], strict=True)
        energy_errors.append((np.mean(energies) - atoms.get_potential_energy()) / len(atoms))
        energy_u.append(np.std(energies) / len(atoms))
        force_errors.extend(np.sqrt(((np.mean(forces, 0) - atoms.get_forces()) ** 2).mean(1)))
        force_u.extend(np.sqrt(np.var(forces, axis=0).mean(1)))
    assert scales["energy"]["scale"] == pytest.approx(conformal_scale(energy_errors, energy_u, 0.3).scale, rel=1e-8)
    assert scales["forces"]["scale"] == pytest.approx(conformal_scale(force_errors, force_u, 0.3).scale, rel=1e-8)


def test_networks_must_fit_the_kind(tmp_path: Path) -> None:
    def export(models: list[GaussianMomentNetwork], kind: str) -> None:
        export_model(models, TRAINING, CALIBRATION, settings_of(kind), tmp_path / "model.pt")

    with pytest.raises(ModelError, match=r"'ensemble' needs 3 trained networks .* but 1 were given"):
        export([network(0)], "ensemble")
    with pytest.raises(ModelError, match="'distance' needs 1 trained networks"):
        export([network(0), network(1)], "distance")
    other = GaussianMomentNetwork([*ELEMENTS, "F"], SETTINGS)
    with pytest.raises(ModelError, match="same elements and cutoff"):
        export([network(0), network(1), other], "ensemble")


# ------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("kind", KINDS)
def test_file_carries_its_kind_and_energies(files: dict[str, Path], kind: str) -> None:
    evaluator = Model(files[kind], "double")
    atoms = triclinic()
    results = [energy_and_forces(network(3 + m), atoms) for m in range(settings_of(kind).networks)]
    prediction = evaluator.predict_one(atoms)
    assert evaluator.metadata["uncertainty"]["kind"] == kind
    record = evaluator.metadata["uncertainty"]
    assert record["projections"] == (3 if kind == "ensemble" else 16)
    assert ("members" in record, "references" in record) == (kind == "ensemble", kind == "distance")
    assert prediction.energy == pytest.approx(np.mean([energy for energy, _ in results]), rel=1e-12)
    np.testing.assert_allclose(prediction.forces, np.mean([forces for _, forces in results], 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("atoms", [molecule("CH3CONH2"), triclinic()], ids=["molecule", "cell"])
def test_forces_and_bias_forces_are_derivatives(files: dict[str, Path], kind: str, atoms: Atoms) -> None:
    evaluator = Model(files[kind], "double")
    atoms = labelled(atoms, 79)  # a structure whose nearest training feature no step below changes

    def moved(positions: np.ndarray) -> Atoms:
        copy = atoms.copy()
        copy.positions = positions
        return copy

    forces = evaluator.predict_one(atoms).forces
    gradient = evaluator.uncertainty_gradient(atoms)[1]
    total, summed, _ = evaluator.atomic_uncertainty_gradient(atoms)
    assert total == pytest.approx(evaluator.predict_one(atoms).atomic_u.sum(), rel=1e-12)
    for analytic, numeric in (
        (-forces, central(lambda x: evaluator.predict_one(moved(x)).energy, atoms.positions, 5e-4)),
        (gradient, central(lambda x: evaluator.predict_one(moved(x)).u, atoms.positions, 5e-4)),
        (summed, central(lambda x: evaluator.predict_one(moved(x)).atomic_u.sum(), atoms.positions, 5e-4)),
    ):
        assert np.abs(analytic).max() > 1e-4
        assert np.abs(analytic - numeric).max() < 1e-6 * np.abs(analytic).max()


@pytest.mark.parametrize("kind", KINDS)
def test_strain_gradients_are_derivatives(files: dict[str, Path], kind: str) -> None:
    evaluator = Model(files[kind], "double")
    atoms = triclinic()

    def strained(epsilon: np.ndarray) -> Prediction:
        moved = atoms.copy()
        moved.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (epsilon + epsilon.T)), scale_atoms=True)
        return evaluator.predict_one(moved)

    for analytic, numeric in (
        (evaluator.uncertainty_gradient(atoms)[2], central(lambda e: strained(e).u, np.zeros((3, 3)), 1e-4)),
        (
            evaluator.atomic_uncertainty_gradient(atoms)[2],
            central(lambda e: strained(e).atomic_u.sum(), np.zeros((3, 3)), 1e-4),
        ),
    ):
        assert np.abs(analytic).max() > 1e-4
        assert np.abs(analytic - numeric).max() < 1e-6 * np.abs(analytic).max()


@pytest.mark.parametrize("kind", KINDS)
def test_supercells_and_lone_atoms(files: dict[str, Path], kind: str) -> None:
    """A repeated cell has the same u and u_i; an atom without neighbours has finite ones and no forces."""
    evaluator = Model(files[kind], "double")
    one, four = evaluator.predict([triclinic(), triclinic().repeat((2, 1, 2))])
    assert four.u == pytest.approx(one.u, rel=1e-10)
    np.testing.assert_allclose(four.atomic_u.reshape(4, -1), np.tile(one.atomic_u, (4, 1)), rtol=1e-9)
    lone = evaluator.predict_one(Atoms("C"))
    assert np.isfinite([lone.energy, lone.u, *lone.atomic_u]).all()
    assert not lone.forces.any()
    assert not evaluator.uncertainty_gradient(Atoms("C"))[1].any()
    assert not evaluator.atomic_uncertainty_gradient(Atoms("C"))[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision_is_close_to_double(files: dict[str, Path], kind: str) -> None:
    exact, rough = Model(files[kind], "double"), Model(files[kind], "mixed")
    atoms = labelled(molecule("CH3CONH2"), 99)
    a, b = exact.predict_one(atoms), rough.predict_one(atoms)
    assert b.u == pytest.approx(a.u, rel=1e-3)
    np.testing.assert_allclose(b.atomic_u, a.atomic_u, rtol=0, atol=1e-3 * a.atomic_u.max())
    np.testing.assert_allclose(b.feature, a.feature, rtol=0, atol=1e-4 * np.abs(a.feature).max())
    du, dv = exact.uncertainty_gradient(atoms)[1], rough.uncertainty_gradient(atoms)[1]
    assert np.abs(du - dv).max() < 1e-3 * np.abs(du).max()


@pytest.mark.parametrize("kind", KINDS)
def test_ase_calculator_runs_the_file(files: dict[str, Path], kind: str) -> None:
    atoms = molecule("CH3CONH2")
    atoms.calc = Calculator(files[kind], bias_force=0.3)
    evaluator = atoms.calc.evaluator
    u, gradient, _ = evaluator.uncertainty_gradient(atoms)
    plain = evaluator.predict_one(atoms)
    assert atoms.get_potential_energy() == pytest.approx(plain.energy - 0.3 * u, rel=1e-12)
    np.testing.assert_allclose(atoms.get_forces(), plain.forces + 0.3 * gradient, rtol=0, atol=1e-12)
    assert u == pytest.approx(plain.u, rel=1e-12)


# ------------------------------------------------------------------------------------------ pickled


@pytest.mark.parametrize(("kind", "precision"), [(k, "double") for k in KINDS] + [("distance", "single")])
def test_pickled_calculators_are_the_same_without_their_file(
    files: dict[str, Path], tmp_path: Path, kind: str, precision: str
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(files[kind].read_bytes())
    original = Calculator(path, precision, bias_force=0.3, label="mine")
    path.write_bytes(b"another file by now")
    atoms = labelled(triclinic(2.0), 1)
    expected = results_of(original, atoms)
    for again in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original), copy.copy(original)):
        assert again.bias_force == 0.3
        assert again.label == "mine"
        assert again.evaluator.metadata == original.evaluator.metadata
        for value, other in zip(expected, results_of(again, atoms), strict=True):
            np.testing.assert_array_equal(value, other)


def test_calculators_work_in_other_processes(files: dict[str, Path]) -> None:
    calculator = Calculator(files["distance"])
    shaken = [labelled(triclinic(2.0), seed) for seed in range(3)]
    expected = [results_of(calculator, atoms) for atoms in shaken]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(results_of, [calculator] * 3, shaken))
    for values, others in zip(expected, found, strict=True):
        for value, other in zip(values, others, strict=True):
            np.testing.assert_array_equal(value, other)


def test_structures_with_a_calculator_can_be_pickled_with_its_results(files: dict[str, Path]) -> None:
    atoms = triclinic(2.0)
    atoms.calc = Calculator(files["distance"])
    energy = atoms.get_potential_energy()
    again = pickle.loads(pickle.dumps(atoms))
    assert again.calc.results["energy"] == energy
    assert again.get_potential_energy() == energy
