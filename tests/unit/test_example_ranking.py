"""lammps_examples/panel/ranking.py: its features and posteriors against their definitions."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ubmd.data.graph import build_graph, collate
from ubmd.potentials.gmnn.deployed import DeployedModel
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.settings import ModelSettings

SCRIPT = Path(__file__).parents[2] / "lammps_examples" / "panel" / "ranking.py"
ELEMENTS = ["H", "C", "O"]


def _script() -> Any:
    specification = importlib.util.spec_from_file_location("example_ranking", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["example_ranking"] = module
    specification.loader.exec_module(module)
    return module


ranking = _script()


def _molecule(seed: int) -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


@pytest.fixture(scope="module")
def probe() -> Any:
    settings = ModelSettings(cutoff=4.0, n_radial=2, n_basis=4, hidden=(8, 6))
    model = GaussianMomentNetwork(ELEMENTS, settings, seed=1)
    with torch.no_grad():
        model.scale.copy_(torch.tensor([1.3, 0.7, 0.9]))
        model.constant.fill_(0.4)
    return ranking.Probe(model)


def _values(probe: Any, *structures: Atoms) -> Any:
    return ranking.together([probe.values(build_graph(atoms, ELEMENTS, 4.0)) for atoms in structures])


def test_features_and_forces_are_those_of_model_files(probe: Any) -> None:
    graph = build_graph(_molecule(0), ELEMENTS, 4.0)
    values = probe.values(graph)
    deployed = DeployedModel(probe.model, probe.sketch).double()
    phi = deployed(graph.species, graph.edge_index, graph.edge_vector, graph.n_atoms)[1]
    torch.testing.assert_close(values.phi, phi)
    torch.testing.assert_close(values.forces, probe.model.energy_forces_virial(collate([graph]))[1])


def test_jacobians_are_derivatives_of_the_sums(probe: Any) -> None:
    step, (atom, axis) = 1e-5, (1, 2)
    found = _values(probe, _molecule(0))
    sums = []
    for sign in (1, -1):
        moved = _molecule(0)
        moved.positions[atom, axis] += sign * step
        values = _values(probe, moved)
        sums.append((values.small_phi.sum(0), values.last.sum(0)))
    for (up, down), jacobian in zip(zip(*sums, strict=True), (found.jacobian, found.jacobian_last), strict=True):
        torch.testing.assert_close(jacobian[atom, :, axis], (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


def test_radial_gradient_is_that_of_autograd(probe: Any) -> None:
    graph = build_graph(_molecule(0), ELEMENTS, 4.0)
    model, atom = probe.model, 1
    model.radial.requires_grad_(True)
    energy = model(graph.species, graph.edge_index, graph.edge_vector, graph.n_atoms)[atom]
    (gradient,) = torch.autograd.grad(energy, model.radial)
    # [Z_i, Z_j, s, b] -> [Z_i, s, Z_j, b], of all Z_i
    expected = ranking.RADIAL_DEVIATION * gradient.permute(0, 2, 1, 3).flatten()
    torch.testing.assert_close(probe.values(graph).gradient_radial[atom], expected)


def test_posterior_of_forces_is_its_formula() -> None:
    random = np.random.default_rng(0)
    training, judged = (torch.from_numpy(random.normal(size=(n, 5, 3))) for n in (4, 3))
    observed = torch.tensor([True, True, False, True])
    rows = training[observed].transpose(1, 2).reshape(-1, 5)
    scale2 = rows.square().sum(1).mean()
    inverse = torch.linalg.inv(rows.T @ rows / scale2 + 1e-4 * torch.eye(5, dtype=torch.float64))
    expected = (1e-4 * torch.einsum("npa,pq,nqa->n", judged, inverse, judged) / scale2).sqrt()
    torch.testing.assert_close(ranking.of_forces(training, judged, observed), expected, rtol=1e-5, atol=1e-7)


def test_exact_posterior_is_what_a_large_sketch_tends_to(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "LAMBDA2", 0.1)  # with less, the share outside a large sketch counts
    training, judged = _values(probe, _molecule(0)), _values(probe, _molecule(7), _molecule(8))
    for radial in (False, True):
        add = (lambda v: v.phi + v.radial) if radial else (lambda v: v.phi)
        sketched = ranking.posterior(add(training), add(judged), 0.1)
        torch.testing.assert_close(ranking.exact(training, judged, radial), sketched, rtol=0.15, atol=0.0)


def test_several_structures_keep_their_pairs(probe: Any) -> None:
    first, second = _molecule(0), _molecule(1)
    apart = [
        ranking.averaged(torch.arange(6.0, dtype=torch.float64) + k, _values(probe, atoms), True)
        for k, atoms in ((0, first), (6, second))
    ]
    both = ranking.averaged(torch.arange(12.0, dtype=torch.float64), _values(probe, first, second), True)
    torch.testing.assert_close(both, torch.cat(apart))


def test_ideal_correlation_is_reached_by_ideal_errors() -> None:
    random = np.random.default_rng(0)
    u, structure = random.lognormal(size=3000), np.repeat(np.arange(300), 10)
    error = u * np.sqrt(random.chisquare(3, 3000) / 3.0)
    atoms, maxima = ranking.ideal(u, structure)
    found = ranking.rank_pair(ranking.Judged(error, {"u": u}, structure), "u")
    assert found == pytest.approx((atoms, maxima), abs=0.05)
    assert atoms < 0.95


def test_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    error = np.arange(4.0)
    judged = ranking.Judged(error, {"|F|": error, "forces, p = 64": 2 * error}, np.array([0, 0, 1, 1]))
    found = [dict.fromkeys(ranking.JUDGED, judged)] * 2
    np.savez(tmp_path / "a.npz", **ranking.flat(found))
    again = ranking.read(tmp_path / "a.npz", 2)
    assert list(again[1]["outside"].u) == list(judged.u)
    np.testing.assert_array_equal(again[1]["outside"].u["forces, p = 64"], 2 * error)
