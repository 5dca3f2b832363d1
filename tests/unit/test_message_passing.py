"""Networks with message passing in Python: periodic images, batches, precision, record."""

from __future__ import annotations

from pathlib import Path

import message_passing
import numpy as np
import pytest
from ase import Atoms
from small_model import ELEMENTS, central, labelled, triclinic

import ubmd
from ubmd.calculator import Model
from ubmd.potentials.record import format_of, precision_for, read_record


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of 4 Å in cells of 3 Å: every atom is its own neighbour's neighbour."""
    path = tmp_path_factory.mktemp("messages") / "model.pt"
    message_passing.export(path, ELEMENTS, [labelled(triclinic(), seed) for seed in range(6)])
    return path


def shaken(seed: int, repeat: tuple[int, int, int] = (1, 1, 1)) -> Atoms:
    atoms = labelled(triclinic(), seed).repeat(repeat)
    atoms.calc = None
    return atoms


def test_a_supercell_says_the_same_of_every_atom(model: Path) -> None:
    small = Model(model).predict_one(shaken(1))
    large = Model(model).predict_one(shaken(1, (2, 3, 2)))
    assert large.energy == pytest.approx(12 * small.energy, rel=1e-12)
    np.testing.assert_allclose(large.forces, np.tile(small.forces, (12, 1)), atol=1e-12)
    np.testing.assert_allclose(large.atomic_u, np.tile(small.atomic_u, 12), rtol=1e-12)
    np.testing.assert_allclose(large.stress, small.stress, atol=1e-12)
    assert large.u == pytest.approx(small.u, rel=1e-12)


def test_its_range_is_three_cutoffs(model: Path) -> None:
    """A chain with steps of 3.3 Å: the first atom feels the fourth and not the fifth."""
    atoms = Atoms("HCNOHC", positions=np.outer(np.arange(6), [3.3, 0.0, 0.0]))

    def energies(moved: int | None) -> float:
        copy = atoms.copy()
        if moved is not None:
            copy.positions[moved, 1] += 0.3
        network = Model(model)._kind
        graph = network.graph(copy)
        return float(network.module.forces(graph.species, graph.edge_index, graph.edge_vector, len(copy))[0][0])

    changes = [abs(energies(k) - energies(None)) for k in range(1, 6)]
    assert all(change > 1e-9 for change in changes[:3])
    assert changes[3:] == [0.0, 0.0]


def test_forces_stress_and_bias_are_derivatives(model: Path) -> None:
    atoms, network = shaken(2), Model(model)
    prediction, gradient, strain_gradient = network.predict_with_gradient(atoms)

    def at(positions: np.ndarray) -> Atoms:
        copy = atoms.copy()
        copy.positions = positions
        return copy

    def strained(strain: np.ndarray) -> Atoms:
        copy = atoms.copy()
        copy.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (strain + strain.T)), scale_atoms=True)
        return copy

    h = 1e-4  # u is strongly curved: with 1e-3 its differences are off by 4e-5, and with h by the fourth power less
    energy = central(lambda x: network.predict_one(at(x)).energy, atoms.positions, h)
    u = central(lambda x: network.predict_one(at(x)).u, atoms.positions, h)
    np.testing.assert_allclose(prediction.forces, -energy, atol=1e-8 * np.abs(energy).max())
    np.testing.assert_allclose(gradient, u, atol=1e-6 * np.abs(u).max())
    energy = central(lambda e: network.predict_one(strained(e)).energy, np.zeros((3, 3)), h)
    u = central(lambda e: network.predict_one(strained(e)).u, np.zeros((3, 3)), h)
    np.testing.assert_allclose(
        prediction.stress, energy[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / atoms.get_volume(), atol=1e-7
    )
    assert strain_gradient is not None
    np.testing.assert_allclose(strain_gradient, u, atol=1e-6 * np.abs(u).max())


def test_structures_in_one_batch_do_not_see_each_other(model: Path) -> None:
    structures = [shaken(3), shaken(4, (2, 1, 1)), Atoms("OH", positions=[[0, 0, 0], [0, 0, 1]]), Atoms("C")]
    network = Model(model)
    for together, alone in zip(network.predict(structures), map(network.predict_one, structures), strict=True):
        assert together.energy == pytest.approx(alone.energy, rel=1e-12)
        np.testing.assert_allclose(together.forces, alone.forces, atol=1e-12)
        np.testing.assert_allclose(together.atomic_u, alone.atomic_u, rtol=1e-12)
        np.testing.assert_allclose(together.feature, alone.feature, rtol=1e-12)


def test_the_record_says_how_it_is_run(model: Path) -> None:
    record = read_record(model)
    assert record is not None
    said = {name: record[name] for name in ("format", "layers", "fixed_precision", "precision", "backend")}
    assert said == {
        "format": 4,  # factors of elements
        "layers": 3,
        "fixed_precision": True,
        "precision": "float64",
        "backend": {"name": "message_passing", "version": "1", "licence": "MIT"},
    }
    assert format_of(layers=3, fixed_precision=True) == 2  # without these
    assert precision_for(model, "single") == "double"
    atoms = shaken(5)
    atoms.calc = ubmd.Calculator(model)
    assert atoms.get_potential_energy() == Model(model).predict_one(shaken(5)).energy
