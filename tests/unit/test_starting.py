"""Trainings that start from an earlier model, or continue a finished one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.calculator import Model
from ubmd.data.graph import build_graph
from ubmd.data.labels import labels_of
from ubmd.errors import ModelError, SettingsError
from ubmd.files import file_hash
from ubmd.potentials.fitting import export_checkpoints
from ubmd.potentials.gmnn import checkpoint
from ubmd.potentials.gmnn.backend import GaussianMoments
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.starting import adapt, networks_in
from ubmd.potentials.gmnn.trainer import prolongation, train
from ubmd.potentials.interface import Labels, TrainingTable
from ubmd.potentials.members import train_networks
from ubmd.potentials.starting import file_to_start_from, start_from
from ubmd.settings import ModelSettings, TrainingSettings, UncertaintySettings

MODEL = ModelSettings(hidden=(8, 8), n_radial=2, cutoff=4.0)
TRAINING = TrainingSettings(epochs=4, threads=1, checkpoint_every=2, batch_size=2)
BACKEND = GaussianMoments()


def labelled(seed: int, offset: float = 0.0) -> Atoms:
    """Water or ammonia with labels that are harmonic in nothing in particular."""
    atoms = molecule("H2O" if seed % 2 else "NH3")
    atoms.rattle(0.05, seed=seed)
    rng = np.random.default_rng(seed)
    energy = -5.0 * len(atoms) + rng.normal() + offset * len(atoms)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=rng.normal(size=(len(atoms), 3)))
    return atoms


TRAIN, VALID = [labelled(k) for k in range(6)], [labelled(k) for k in range(6, 9)]


def energies(model: GaussianMomentNetwork, structures: list[Atoms]) -> list[float]:
    graphs = [build_graph(atoms, model.elements, model.cutoff) for atoms in structures]
    with torch.no_grad():
        return [float(model(g.species, g.edge_index, g.edge_vector, g.n_atoms).sum()) for g in graphs]


def trained(folder: Path, model: ModelSettings = MODEL, members: int = 1) -> list[Path]:
    kind = {"kind": "ensemble", "members": members} if members > 1 else {"projections": 8}
    table = TrainingTable(model, TRAINING)
    paths = train_networks(BACKEND, members, table, Labels(TRAIN, VALID), folder, seed=3)
    uncertainty = UncertaintySettings.model_validate(kind)
    export_checkpoints(BACKEND, paths, model, TRAIN, VALID, uncertainty, folder / "model.pt", {})
    return paths


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    trained(path)
    return path


def test_a_model_file_gives_its_network_back(folder: Path) -> None:
    (network,) = networks_in(folder / "model.pt")
    original = checkpoint.load_weights(folder / "weights.pt")
    assert network.config() == original.config()
    assert network.radial.dtype == original.radial.dtype == torch.float32
    for found, wanted in zip([*network.weights, *network.biases], [*original.weights, *original.biases], strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0.0)
    torch.testing.assert_close(network.radial, original.radial, rtol=0.0, atol=0.0)
    np.testing.assert_allclose(energies(network, VALID), energies(original, VALID), rtol=1e-7)


def test_files_of_a_training_hold_the_same_network(folder: Path) -> None:
    found = [networks_in(folder / name)[0] for name in ("weights.pt", "checkpoint.pt")]
    assert energies(found[0], VALID) == energies(found[1], VALID)


@pytest.mark.parametrize("baseline", ["zbl", "atoms", "both"])
def test_networks_of_sums_are_found(tmp_path: Path, baseline: str) -> None:
    chosen = {"baseline": "zbl"} if baseline != "atoms" else {}
    chosen |= {"atom_energies": {"H": -1.0, "N": -2.0, "O": -3.0}} if baseline != "zbl" else {}
    model = ModelSettings.model_validate(MODEL.model_dump() | chosen)
    (weights,) = trained(tmp_path, model)
    (network,), original = networks_in(tmp_path / "model.pt"), checkpoint.load_weights(weights)
    assert network.config() == original.config()
    np.testing.assert_allclose(energies(network, VALID), energies(original, VALID), rtol=1e-6)


def test_members_of_an_ensemble_are_found(tmp_path: Path) -> None:
    paths = trained(tmp_path, members=3)
    found = networks_in(tmp_path / "model.pt")
    assert len(found) == 3
    for network, path in zip(found, paths, strict=True):
        np.testing.assert_allclose(energies(network, VALID), energies(checkpoint.load_weights(path), VALID), rtol=1e-6)
    with pytest.raises(ModelError, match="has 3 networks, but 2 are trained"):
        adapt(tmp_path / "model.pt", TRAIN, [tmp_path / "a.pt", tmp_path / "b.pt"])


def test_constants_are_fitted_to_other_labels(folder: Path, tmp_path: Path) -> None:
    """Labels whose zero is another one: the old model's energies, shifted by a constant per element."""
    evaluator, wanted = Model(folder / "model.pt", "double"), {"H": 1.5, "N": -20.0, "O": 300.0}
    others = []
    for atoms, found in zip(TRAIN, evaluator.predict(TRAIN), strict=True):
        copy = atoms.copy()
        energy = found.energy + sum(wanted[symbol] for symbol in atoms.symbols)
        copy.calc = SinglePointCalculator(copy, energy=energy, forces=found.forces)
        others.append(copy)
    # Water and ammonia do not tell H from the others: the constants of smallest norm give the same energies.
    added = adapt(folder / "model.pt", others, [tmp_path / "weights.pt"])
    for symbols in ("H2O", "NH3"):
        atoms = molecule(symbols)
        sums = [sum(table[symbol] for symbol in atoms.symbols) for table in (added, wanted)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-5)
    new = checkpoint.load_weights(tmp_path / "weights.pt")
    np.testing.assert_allclose(energies(new, others), [labels_of(a)["energy"] for a in others], atol=1e-4)


def test_a_training_starts_from_a_model_file(folder: Path, tmp_path: Path) -> None:
    paths, constants = start_from(folder / "model.pt", BACKEND, 1, MODEL, TRAIN, tmp_path / "initial")
    assert paths == [tmp_path / "initial" / "weights.pt"]
    assert set(constants) == {"H", "N", "O"}
    slow = TRAINING.model_copy(update={"warm_learning_rate_factor": 1e-9, "epochs": 1})
    result = train(MODEL, slow, TRAIN, VALID, tmp_path / "next", seed=5, initial=paths[0])
    np.testing.assert_allclose(
        energies(result.model, VALID), energies(checkpoint.load_weights(paths[0]), VALID), rtol=1e-5
    )


def test_what_cannot_be_started_from(folder: Path, tmp_path: Path) -> None:
    assert file_to_start_from(folder, BACKEND, "--from") == folder / "model.pt"
    with pytest.raises(SettingsError, match=r"start.model: there is no file"):
        file_to_start_from(tmp_path / "no.pt", BACKEND, "start.model")
    with pytest.raises(SettingsError, match=r"--from: the folder .* has no model.pt and no weights.pt"):
        file_to_start_from(tmp_path, BACKEND, "--from")
    (tmp_path / "text.pt").write_text("something else")
    with pytest.raises(ModelError, match="is not a weights or checkpoint file of ubmd"):
        networks_in(tmp_path / "text.pt")
    salt = Atoms("NaCl", [(0, 0, 0), (2.3, 0, 0)])
    salt.calc = SinglePointCalculator(salt, energy=-1.0, forces=np.zeros((2, 3)))
    with pytest.raises(ModelError, match="does not contain the element Cl of the new labels"):
        adapt(folder / "weights.pt", [salt], [tmp_path / "weights.pt"])


def test_a_finished_training_is_prolonged_as_if_it_had_not_ended(tmp_path: Path) -> None:
    """Killed after four epochs of eight, or finished after four: from there on the same eight."""
    longer = TRAINING.model_copy(update={"epochs": 8})

    def of(name: str, settings: TrainingSettings, **how: object) -> list[dict]:
        return train(MODEL, settings, TRAIN, VALID, tmp_path / name, 3, prolong=True, **how).history  # type: ignore[arg-type]

    first = of("a", TRAINING)
    text = prolongation(tmp_path / "a", 8)
    assert text == "Continues after epoch 4 of 4, with the optimiser as it was, to epoch 8."
    rows = of("a", longer)
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[:4] == first
    assert prolongation(tmp_path / "a", 8) == ""
    # an independent way: the same state, loaded into a trainer of eight epochs by hand
    of("b", TRAINING)
    saved = checkpoint.load(tmp_path / "b" / "checkpoint.pt", "checkpoint")
    saved["identity"]["training.epochs"] = "8"
    saved["finished"] = False
    torch.save(saved, tmp_path / "b" / "checkpoint.pt")
    by_hand = of("b", longer)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in by_hand]
    assert file_hash(tmp_path / "a" / "weights.pt") == file_hash(tmp_path / "b" / "weights.pt")


def test_without_the_optimisers_state_it_continues_from_the_best_weights(tmp_path: Path) -> None:
    train(MODEL, TRAINING, TRAIN, VALID, tmp_path, 3)
    assert "optimiser starts anew" in prolongation(tmp_path, 6)
    result = train(MODEL, TRAINING.model_copy(update={"epochs": 6}), TRAIN, VALID, tmp_path, 3, prolong=True)
    assert len(result.history) == 6
    with pytest.raises(Exception, match=r"training.epochs was 6, now 5"):
        train(MODEL, TRAINING.model_copy(update={"epochs": 5}), TRAIN, VALID, tmp_path, 3, prolong=True)
