"""The whole model against numbers from an independent, slow float64 evaluation (tests/golden_gmnn.json)."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from ubmd.calculator import Calculator
from ubmd.data.graph import build_graph, collate
from ubmd.operators import use_operators
from ubmd.potentials.file import write_model
from ubmd.potentials.fitting import fit_posterior
from ubmd.potentials.gmnn.deployed import DeployedModel
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.sketch import GradientSketch
from ubmd.settings import ModelSettings

GOLDEN = json.loads((Path(__file__).parent.parent / "golden_gmnn.json").read_text())
TOLERANCE = 1e-9  # relative to the largest component


def fill(shape: tuple[int, ...], offset: float) -> torch.Tensor:
    """sin(offset + 1.3 k), k row-major: the golden file's parameters."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(offset + 1.3 * k).reshape(shape)


def atoms_from(record: dict) -> Atoms:
    cell = record.get("cell")
    return Atoms(record["symbols"], positions=record["positions"], cell=cell, pbc=cell is not None)


def golden_model(operators: bool) -> GaussianMomentNetwork:
    settings = ModelSettings(
        cutoff=GOLDEN["r_c"],
        n_radial=GOLDEN["N_r"],
        n_basis=GOLDEN["N_b"],
        r_min=GOLDEN["r_min"],
        hidden=tuple(GOLDEN["hidden"]),
    )
    model = GaussianMomentNetwork(GOLDEN["elements"], settings).to_network_dtype(torch.float64)
    use_operators(model, operators)
    h1, h2 = GOLDEN["hidden"]
    d0, z = model.network.weight1.size(1), len(GOLDEN["elements"])
    shapes = [(h1, d0), (h1,), (h2, h1), (h2,), (1, h2), (1,)]
    with torch.no_grad():
        model.radial.copy_(fill((z, z, GOLDEN["N_r"], GOLDEN["N_b"]), 0.1))
        layers = [parameter for pair in zip(model.weights, model.biases, strict=True) for parameter in pair]
        for k, (parameter, shape) in enumerate(zip(layers, shapes, strict=True)):
            parameter.copy_(fill(shape, 0.2 + 0.1 * k))
        model.scale.copy_(1 + 0.1 * fill((z,), 0.8))
        model.shift.copy_(2 * fill((z,), 0.9))
        model.constant.fill_(GOLDEN["c"])
    return model


@pytest.fixture
def model_file(tmp_path: Path, operators: bool) -> Path:
    model = golden_model(operators)
    h1, h2 = GOLDEN["hidden"]
    d0, p = model.network.weight1.size(1), GOLDEN["p"]
    sketch = GradientSketch((d0, h1, h2), p, seed=0)
    inner = [fill((p, d + 1), 1.0 + 0.1 * k) for k, d in enumerate((d0, h1, h2))]
    sketch.set_projections(inner, [fill((p, h1), 1.3), fill((p, h2), 1.4)])
    metadata = {
        "format": 1,
        "elements": GOLDEN["elements"],
        "cutoff": GOLDEN["r_c"],
        "uncertainty": {"energy": {"feature_scale": 1.0}},
    }
    deployed = DeployedModel(model, sketch, json.dumps(metadata))
    use_operators(deployed, operators)
    graphs = [build_graph(atoms_from(record), GOLDEN["elements"], GOLDEN["r_c"]) for record in GOLDEN["train"]]
    fit_posterior(deployed, graphs, GOLDEN["lambda2"])
    path = tmp_path / "model.pt"
    write_model(deployed, path)
    return path


def assert_close(actual: object, expected: object, name: str) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, name
    error, size = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= TOLERANCE * size, f"{name}: error {error:.2e}, largest component {size:.2e}"


@pytest.mark.parametrize("record", GOLDEN["structures"], ids=lambda record: record["name"])
def test_model_file_reproduces_golden_numbers(record: dict, model_file: Path) -> None:
    atoms = atoms_from(record)
    calculator = Calculator(model_file, precision="double")
    atoms.calc = calculator
    evaluator = calculator.evaluator
    graph = build_graph(atoms, evaluator.elements, evaluator.cutoff)
    module = evaluator.module
    assert graph.edge_index.size(1) == record["pairs"]
    energies, phi = module(graph.species, graph.edge_index, graph.edge_vector, len(atoms))
    u, gradient, strain = evaluator.uncertainty_gradient(atoms)
    assert_close(energies, record["atomic_energies"], "atomic energies")
    assert_close(phi, record["phi"], "phi")
    assert_close(atoms.get_potential_energy(), record["energy"], "energy")
    assert_close(atoms.get_forces(), record["forces"], "forces")
    assert_close(u, record["u"], "u")
    assert_close(gradient, record["grad_u"], "du/dr")
    assert_close(calculator.results["atomic_uncertainties"], record["atomic_u"], "atomic u")
    if record["cell"] is not None:
        assert_close(atoms.get_stress(voigt=False), record["stress"], "stress")
        assert_close(strain, record["strain_gradient_of_u"], "du/d(strain)")


@pytest.mark.parametrize("record", GOLDEN["structures"], ids=lambda record: record["name"])
def test_invariants_and_training_path(record: dict, operators: bool) -> None:
    """The eager model that training uses gives the same numbers as the file."""
    model = golden_model(operators)
    batch = collate([build_graph(atoms_from(record), GOLDEN["elements"], GOLDEN["r_c"])])
    invariants = model.descriptor(batch.species, batch.edge_index, batch.edge_vector, len(batch.species))
    energy, forces, _ = model.energy_forces_virial(batch)
    assert_close(invariants[0].detach(), record["invariants_first_atom"], "invariants of the first atom")
    assert_close(energy[0].detach(), record["energy"], "energy")
    assert_close(forces, record["forces"], "forces")
