"""Calibration with weights, by structure and by element: against the definitions, in plain loops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.data import atomic_numbers
from small_model import ELEMENTS, SETTINGS, labelled

from ubmd.calculator import Model
from ubmd.errors import DataError, ModelError
from ubmd.potentials.fitting import export_raw, outcomes
from ubmd.potentials.gmnn.export import export_model, raw_module
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.record import parse_record
from ubmd.settings import UncertaintySettings
from ubmd.uncertainty import conformal_scale
from ubmd.uncertainty.calibration import Outcome, calibrate, element_factors
from ubmd.uncertainty.conformal import EPSILON


def naive_scale(errors, u, alpha, weights):
    """(factor, level): tries each ratio in turn; the new point has weight 1 and no ratio reaches it."""
    ratios = [(error + EPSILON) / (own + EPSILON) for error, own in zip(errors, u, strict=True)]
    for ratio in sorted(ratios):
        below = sum(weight for other, weight in zip(ratios, weights, strict=True) if other <= ratio)
        if below / (sum(weights) + 1.0) >= 1.0 - alpha - 1e-9:
            return ratio, 1.0 - alpha
    return max(ratios), sum(weights) / (sum(weights) + 1.0)


@pytest.mark.parametrize("n", [1, 2, 5, 19, 20, 60])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.32, 0.5])
def test_weighted_factor_is_that_of_the_definition(n, alpha):
    rng = np.random.default_rng(n)
    for _ in range(20):
        errors, u = rng.exponential(size=n), rng.uniform(0.5, 2.0, n)
        weights = rng.choice([1.0, 0.5 ** (1 / 3), 0.25, 0.031], n)
        found = conformal_scale(errors, u, alpha, weights)
        assert (found.scale, found.attainable) == pytest.approx(naive_scale(errors, u, alpha, weights), rel=1e-12)
        assert found.count == n
        assert conformal_scale(errors, u, alpha, np.ones(n)) == conformal_scale(errors, u, alpha)


@pytest.mark.parametrize("weight", [0.1, 0.7937005259840998, 1.0, 3.0])
def test_sums_of_equal_weights_count_as_their_number_does(weight):
    """0.1 + 0.1 + ... is not 0.1 n: the level must not change by a ratio for that."""
    for n in range(1, 80):
        errors = np.arange(1.0, n + 1.0)
        wanted = naive_scale(errors, np.ones(n), 0.05, [weight] * n)
        assert conformal_scale(errors, np.ones(n), 0.05, np.full(n, weight)).scale == pytest.approx(wanted[0], rel=1e-9)


def test_weights_promise_what_they_do_when_the_data_drift():
    """Errors grow by 5 % per step: fixed weights that favour the last ones cover, those of all alike do not."""
    rng, covered = np.random.default_rng(3), {"alike": 0, "ageing": 0}
    age = np.arange(60)[::-1]
    for _ in range(400):
        errors = rng.exponential(size=61) * 1.05 ** np.arange(61)
        for name, weights in {"alike": np.ones(60), "ageing": 0.9**age}.items():
            covered[name] += errors[-1] <= conformal_scale(errors[:-1], np.ones(60), 0.1, weights).scale
    assert covered["alike"] < 320  # of 360
    assert covered["ageing"] > 330


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0, 1.0], [np.nan, 1.0], [1.0]])
def test_weights_must_be_positive_numbers(weights):
    with pytest.raises(DataError, match="Conformal calibration"):
        conformal_scale([1.0, 2.0], [1.0, 1.0], 0.1, weights)


# ------------------------------------------------------------------------------------------ by element


def made(seed, n=30, factors=((1, 1.0), (6, 3.0)), weights=None):
    """Molecules of two carbons and four hydrogens whose errors are ``factors`` times as large as u says."""
    rng, found = np.random.default_rng(seed), []
    numbers = np.array([6, 6, 1, 1, 1, 1])
    for k in range(n):
        u = rng.uniform(0.5, 2.0, 6)
        errors = u * np.array([dict(factors)[number] for number in numbers]) * np.abs(rng.normal(size=6))
        found.append(
            Outcome(
                rng.exponential(), rng.uniform(0.5, 1.0), numbers, errors, u, 1.0 if weights is None else weights[k]
            )
        )
    return found


def naive_factors(said, alpha, elements, needed):
    everything = [(e, u, o.weight) for o in said for e, u in zip(o.errors, o.u, strict=True)]
    pooled = _naive_of(everything, alpha)
    result = {}
    for element in elements:
        own = [(e, u, o.weight) for o in said for e, u, z in zip(o.errors, o.u, o.numbers, strict=True) if z == element]
        having = sum(o.weight for o in said if element in o.numbers)
        share = min(1.0, having / needed)
        result[element] = (_naive_of(own, alpha) / pooled) ** share if own else 1.0
    return result


def _naive_of(rows, alpha):
    errors, u, weights = zip(*rows, strict=True)
    return naive_scale(errors, u, alpha, weights)[0]


@pytest.mark.parametrize(("n", "alpha", "needed"), [(5, 0.05, 19), (40, 0.05, 19), (12, 0.1, 9), (3, 0.5, 1)])
def test_factors_of_the_elements_are_those_of_the_definition(n, alpha, needed):
    weights = np.random.default_rng(0).choice([1.0, 0.5, 0.25], n)
    said = made(n, n, weights=weights)
    found = element_factors(said, alpha, [1, 6, 8])
    assert found == pytest.approx(naive_factors(said, alpha, [1, 6, 8], needed), rel=1e-9)
    assert found[8] == 1.0  # none of them has oxygen


def test_few_structures_change_little_however_many_atoms_they_have():
    def ratio(said):
        factors = element_factors(said, 0.05, [1, 6])
        return factors[6] / factors[1]

    assert ratio(made(1, 200)) == pytest.approx(3.0, rel=0.2)
    assert ratio(made(1, 2)) < 3.0 ** (2 / 19) * 1.5
    many = [replace(o, **{k: np.tile(getattr(o, k), 500) for k in ("numbers", "errors", "u")}) for o in made(1, 2)]
    assert ratio(many) == pytest.approx(ratio(made(1, 2)), rel=0.05)


def test_the_common_factor_is_that_of_maxima_of_scaled_uncertainties():
    said = made(7, 50)
    found = calibrate(said, 0.1, by_structure=True, elements=[1, 6])
    factors = naive_factors(said, 0.1, [1, 6], 9)
    maxima = [
        (o.errors.max(), max(factors[int(z)] * u for z, u in zip(o.numbers, o.u, strict=True)), 1.0) for o in said
    ]
    assert found.forces.scale == pytest.approx(_naive_of(maxima, 0.1), rel=1e-9)
    assert found.atom_scale == pytest.approx(factors, rel=1e-9)
    assert calibrate(said, 0.1, by_structure=True).atom_scale is None
    # What the elements' factors are for: hydrogen no longer hides behind carbon's factor.
    plain = calibrate(said, 0.1, by_structure=False)
    hydrogen = [o.numbers == 1 for o in said]
    assert (
        np.mean([np.mean(o.errors[h] <= plain.forces.scale * o.u[h]) for o, h in zip(said, hydrogen, strict=True)])
        > 0.97
    )
    own = calibrate(said, 0.1, by_structure=False, elements=[1, 6])
    shares = [
        np.mean(o.errors[o.numbers == z] <= own.forces.scale * own.atom_scale[z] * o.u[o.numbers == z])
        for o in said
        for z in (1, 6)
    ]
    assert np.mean(shares[::2]) == pytest.approx(0.9, abs=0.03)
    assert np.mean(shares[1::2]) == pytest.approx(0.9, abs=0.03)


def test_structures_without_a_moving_atom_calibrate_energies_only():
    empty = replace(made(1, 1)[0], numbers=np.zeros(0, int), errors=np.zeros(0), u=np.zeros(0))
    said = [*made(2, 10), empty]
    for elements in (None, [1, 6]):
        assert calibrate(said, 0.2, True, elements).forces == calibrate(said[:-1], 0.2, True, elements).forces
    assert calibrate(said, 0.2, True).energy.count == 11
    with pytest.raises(DataError, match="atom that is not fixed"):
        calibrate([empty], 0.2, True)
    with pytest.raises(DataError, match="at least one structure"):
        calibrate([], 0.2, True)


# ------------------------------------------------------------------------------------------ model files


@pytest.fixture(scope="module")
def labels():
    return [labelled(molecule("CH3OH"), seed) for seed in range(12)]


def export(labels, path, earlier=(), **settings):
    network = GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=3)
    uncertainty = UncertaintySettings(projections=16, **settings)
    raw = raw_module([network.to_network_dtype(torch.float64)], uncertainty, True, torch.float64)
    return export_raw(raw, "gmnn", SETTINGS, labels[:6], labels[6:], uncertainty, path, {}, earlier)


@pytest.mark.parametrize("kind", ["posterior", "distance", "ensemble"])
def test_uncertainties_of_a_file_have_its_factors(labels, tmp_path, kind):
    networks = [GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=3 + m) for m in range(3 if kind == "ensemble" else 1)]
    files = {}
    for by_element in (False, True):
        settings = UncertaintySettings(projections=16, kind=kind, by_element=by_element, alpha=0.2)
        files[by_element] = tmp_path / f"{by_element}.pt"
        export_model(networks, labels[:6], labels[6:], settings, files[by_element])
    plain, scaled = (Model(files[by_element], "double") for by_element in (False, True))
    assert (plain.metadata["format"], scaled.metadata["format"]) == (1, 4)
    factors = dict(zip(scaled.elements, scaled.metadata["atom_scale"], strict=True))
    assert len(set(factors.values())) > 1
    atoms = labels[11]
    ratio = scaled.metadata["uncertainty"]["forces"]["scale"] / plain.metadata["uncertainty"]["forces"]["scale"]
    wanted = [factors[symbol] * ratio for symbol in atoms.symbols] * plain.predict_one(atoms).atomic_u
    assert scaled.predict_one(atoms).atomic_u == pytest.approx(wanted, rel=1e-12)
    assert scaled.predict_one(atoms).u == pytest.approx(plain.predict_one(atoms).u, rel=1e-12)

    total, gradient, _ = scaled.atomic_uncertainty_gradient(atoms)
    assert total == pytest.approx(sum(wanted), rel=1e-12)
    moved, numerical, h = atoms.copy(), np.zeros((len(atoms), 3)), 1e-4
    for i, k in np.ndindex(numerical.shape):
        values = []
        for sign in (1.0, -1.0):
            moved.positions = atoms.positions
            moved.positions[i, k] += sign * h
            values.append(scaled.predict_one(moved).atomic_u.sum())
        numerical[i, k] = (values[0] - values[1]) / (2.0 * h)
    assert np.abs(gradient - numerical).max() < 1e-5 * np.abs(numerical).max()


def test_what_earlier_models_said_joins_the_held_out_labels(labels, tmp_path):
    record = export(labels, tmp_path / "plain.pt", alpha=0.1)["uncertainty"]
    rng = np.random.default_rng(1)
    numbers = labels[0].numbers
    earlier = [
        Outcome(1e3 * rng.uniform(), 1.0, numbers, 1e3 * rng.uniform(size=6), np.ones(6), 0.5) for _ in range(40)
    ]
    joined = export(labels, tmp_path / "joined.pt", earlier, alpha=0.1)["uncertainty"]
    for name in ("energy", "forces"):
        assert joined["held_out"][name] == {key: record[name][key] for key in ("scale", "attainable", "n_calibration")}
        assert joined[name]["scale"] > 2.0 * record[name]["scale"]
    assert joined["energy"]["n_calibration"] == record["energy"]["n_calibration"] + 40
    assert joined["energy"]["attainable"] == pytest.approx(0.9)
    assert "held_out" not in record


def test_outcomes_are_before_calibration(labels, tmp_path):
    export(labels, tmp_path / "model.pt", by_element=False)
    model = Model(tmp_path / "model.pt", "double")
    graphs = [model._kind.graph(atoms) for atoms in labels[6:]]
    with torch.jit.optimized_execution(False):
        said = outcomes(model.module, graphs, [atomic_numbers[name] for name in model.elements])
    for atoms, outcome, prediction in zip(labels[6:], said, model.predict(labels[6:]), strict=True):
        assert outcome.numbers.tolist() == atoms.numbers.tolist()
        assert outcome.u == pytest.approx(prediction.atomic_u)  # a loaded module's are calibrated already
        assert outcome.energy_error == pytest.approx(abs(prediction.energy - atoms.get_potential_energy()) / 6)
        error = np.sqrt(np.mean((prediction.forces - atoms.get_forces()) ** 2, axis=1))
        assert outcome.errors == pytest.approx(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"atom_scale": [1.0]}, "atom_scale is not a positive number for each element"),
        ({"atom_scale": [1.0, -1.0, 1.0]}, "atom_scale is not"),
        ({"atom_scale": [1.0, "2", 1.0]}, "atom_scale is not"),
        ({"atom_scale": 1.0}, "atom_scale is not"),
        ({"format": 3}, "atom_scale needs format 4"),
    ],
)
def test_damaged_factors_are_refused(labels, tmp_path, change, words):
    record = export(labels, tmp_path / "model.pt", by_element=True)
    assert parse_record(json.dumps(record), Path("model.pt"))["format"] == 4
    with pytest.raises(ModelError, match=words):
        parse_record(json.dumps(record | change), Path("model.pt"))
