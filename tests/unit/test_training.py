"""Training: the loss, the optimiser's settings, exact resume after kill -9, warm starts, and clear refusals."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from small_model import with_emt_labels

from ubmd.data.extxyz import write_structures
from ubmd.data.graph import Batch, Graph, build_graph, collate
from ubmd.data.labels import labels_of
from ubmd.data.split import split
from ubmd.errors import DataError, ModelError, TrainingError
from ubmd.potentials.gmnn.backend import GaussianMoments
from ubmd.potentials.gmnn.checkpoint import load_weights
from ubmd.potentials.gmnn.loss import ErrorSums, differences, loss
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.trainer import train
from ubmd.potentials.history import COLUMNS, _draw_panel, draw
from ubmd.potentials.interface import Labels, TrainingTable
from ubmd.potentials.members import member_folders, train_networks
from ubmd.settings import ModelSettings, TrainingSettings

MODEL = ModelSettings(cutoff=4.0, n_radial=3, n_basis=5, hidden=(24, 24))


def settings(**changes: object) -> TrainingSettings:
    return TrainingSettings(**{"epochs": 8, "batch_size": 4, "threads": 1, "precision": "float64", **changes})


def labelled(atoms: Atoms, seed: int, shift: float = 0.05) -> Atoms:
    """A shaken copy with EMT labels (stress for cells)."""
    atoms = atoms.copy()
    generator = np.random.default_rng(seed)
    if atoms.pbc.all():
        atoms.set_cell(np.asarray(atoms.cell) @ (np.eye(3) + generator.uniform(-0.04, 0.04, (3, 3))), scale_atoms=True)
    atoms.positions += generator.uniform(-shift, shift, (len(atoms), 3))
    return with_emt_labels(atoms)


@pytest.fixture(scope="module")
def molecules() -> list[Atoms]:
    """One composition, no cell."""
    return [labelled(molecule("CH3OH"), seed) for seed in range(12)]


@pytest.fixture(scope="module")
def crystals() -> list[Atoms]:
    return [labelled(bulk("Cu", cubic=True), seed) for seed in range(12)]


def same_weights(left: GaussianMomentNetwork, right: GaussianMomentNetwork) -> bool:
    """Bit for bit."""
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def errors_on(model: GaussianMomentNetwork, structures: list[Atoms]) -> ErrorSums:
    batch = collate([build_graph(atoms, model.elements, model.cutoff) for atoms in structures])
    sums = ErrorSums()
    sums.add(batch, differences(batch, *model.energy_forces_virial(batch)))
    return sums


# --------------------------------------------------------------------------------------------- loss


def test_loss_is_the_published_sum(molecules, crystals):
    """Against the formula, structure by structure, with and without stress labels in one batch."""
    structures = [molecules[0], crystals[0], crystals[1], molecules[1]]
    model = GaussianMomentNetwork(["H", "C", "O", "Cu"], MODEL, seed=1).to_network_dtype(torch.float64)
    batch = collate([build_graph(atoms, model.elements, model.cutoff) for atoms in structures])
    energies, forces, virial = model.energy_forces_virial(batch)
    weights = settings(energy_weight=0.7, force_weight=3.0, stress_weight=0.02)
    expected, first = 0.0, 0
    for k, atoms in enumerate(structures):
        labels = labels_of(atoms)
        own = forces[first : first + len(atoms)].detach().numpy()
        first += len(atoms)
        expected += 0.7 * (energies[k].item() - labels["energy"]) ** 2
        expected += 3.0 * sum(np.linalg.norm(f - g) ** 2 for f, g in zip(own, labels["forces"], strict=True))
        if "stress" in labels:
            volume = atoms.get_volume()
            full = virial[k].detach().numpy() / volume
            six = np.array([full[0, 0], full[1, 1], full[2, 2], full[1, 2], full[0, 2], full[0, 1]])
            expected += 0.02 * volume**2 * np.sum((six - labels["stress"]) ** 2)
    value = loss(differences(batch, energies, forces, virial), weights)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["energy", "force", "stress"])
def test_each_weight_acts(tmp_path, crystals, name):
    """Training on one quantity alone gets it better than training on the other two."""
    weights = {"energy_weight": 1.0, "force_weight": 4.0, "stress_weight": 0.1}
    alone = {key: value if key.startswith(name) else 0.0 for key, value in weights.items()}
    others = {key: 0.0 if key.startswith(name) else value for key, value in weights.items()}
    rmse = {}
    for label, chosen in (("alone", alone), ("others", others)):
        result = train(MODEL, settings(epochs=40, **chosen), crystals[:8], crystals[8:], tmp_path / label, seed=0)
        sums = errors_on(result.model, crystals[:8])
        rmse[label] = sums.rmse(name)
    assert rmse["alone"] < rmse["others"]


# ---------------------------------------------------------------------------------------- optimiser


def test_learning_rates_of_the_four_groups_and_their_decay(tmp_path, molecules):
    """Adam's first step moves a parameter by its learning rate, whatever the gradient."""
    rates = {"learning_rate": 1e-4, "learning_rate_radial": 2e-4, "learning_rate_shift": 3e-4}
    chosen = settings(epochs=1, batch_size=12, learning_rate_scale=4e-4, **rates)
    before = GaussianMomentNetwork(["H", "C", "O"], MODEL, seed=5).to_network_dtype(torch.float64)
    before.initialise_energies([build_graph(atoms, before.elements, before.cutoff) for atoms in molecules[:8]])
    after = train(MODEL, chosen, molecules[:8], molecules[8:], tmp_path, seed=5).model

    def step(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first - second).detach().abs().max())

    for old, new in zip([*before.weights, *before.biases], [*after.weights, *after.biases], strict=True):
        assert step(old, new) == pytest.approx(1e-4, rel=1e-3)
    assert step(before.radial, after.radial) == pytest.approx(2e-4, rel=1e-3)
    assert step(before.shift, after.shift) == pytest.approx(3e-4, rel=1e-3)
    assert step(before.scale, after.scale) == pytest.approx(4e-4, rel=1e-3)


def interrupt_in_epoch_4(row: dict) -> None:
    if row["epoch"] == 4:
        raise KeyboardInterrupt


def test_learning_rates_fall_linearly_to_zero(tmp_path, molecules):
    """5 structures in batches of 2 are 3 steps per epoch; the last step of epoch 3 of 4 uses 1 - 8/12."""
    chosen = settings(epochs=4, batch_size=2, checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(MODEL, chosen, molecules[:5], molecules[5:], tmp_path, seed=0, progress=interrupt_in_epoch_4)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    used = [group["lr"] for group in saved["optimiser"]["param_groups"]]
    assert used == pytest.approx([rate * (1 - 8 / 12) for rate in (0.03, 0.02, 0.05, 0.001)], rel=1e-12)


def test_training_learns_and_keeps_the_best_epoch(tmp_path, molecules):
    """One composition: the mean energy is right from the start, forces are learned, the best weights are returned."""
    generator_state = torch.random.get_rng_state()
    result = train(MODEL, settings(epochs=60), molecules[:9], molecules[9:], tmp_path, seed=3)
    assert torch.equal(generator_state, torch.random.get_rng_state()), "training must not touch the global generator"
    spread = np.std([labels_of(atoms)["energy"] / len(atoms) for atoms in molecules])
    assert result.history[0]["train_energy_rmse_meV_per_atom"] < 1000 * 20 * spread
    assert result.best["valid_force_rmse_eV_per_A"] < 0.3 * result.history[0]["valid_force_rmse_eV_per_A"]
    criteria = [row["valid_energy_mae_meV_per_atom"] / 1000 + row["valid_force_mae_eV_per_A"] for row in result.history]
    assert result.best["epoch"] == int(np.argmin(criteria)) + 1
    assert errors_on(result.model, molecules[9:]).criterion() == pytest.approx(min(criteria), rel=1e-10)
    assert same_weights(load_weights(tmp_path / "weights.pt"), result.model)


def test_same_seed_same_bits_and_other_seed_other_bits(tmp_path, molecules):
    runs = [
        train(MODEL, settings(epochs=3), molecules[:9], molecules[9:], tmp_path / name, seed=seed).model
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert same_weights(runs[0], runs[1])
    assert not same_weights(runs[0], runs[2])


def test_float32_network_follows_float64(tmp_path, molecules):
    results = {
        precision: train(
            MODEL, settings(epochs=5, precision=precision), molecules[:9], molecules[9:], tmp_path / precision, seed=0
        )
        for precision in ("float32", "float64")
    }
    single, double = results["float32"], results["float64"]
    assert single.model.radial.dtype == torch.float32
    assert load_weights(tmp_path / "float32" / "weights.pt").radial.dtype == torch.float32
    assert single.model.shift.dtype == torch.float64
    assert single.history[-1]["loss"] == pytest.approx(double.history[-1]["loss"], rel=1e-2)


def test_stress_is_learned_from_cells_mixed_with_molecules(tmp_path, crystals):
    """Structures without a stress neither break nor dilute the stress errors; an isolated atom is fine, too."""
    alone = Atoms("Cu")
    alone.calc = SinglePointCalculator(alone, energy=3.5, forces=np.zeros((1, 3)))
    chosen = settings(epochs=60, stress_weight=0.1)
    result = train(MODEL, chosen, [*crystals[:8], alone], crystals[8:], tmp_path, seed=0)
    assert result.best["valid_stress_rmse_MPa"] < 0.5 * result.history[0]["valid_stress_rmse_MPa"]
    (row,) = [row for row in result.history if row["epoch"] == result.best["epoch"]]
    prediction = errors_on(result.model, crystals[8:])
    assert prediction.rmse("stress") * 160217.66208 == pytest.approx(row["valid_stress_rmse_MPa"], rel=1e-6)


def test_threads_are_set_and_restored(tmp_path, molecules):
    before = torch.get_num_threads()
    seen = []
    train(
        MODEL,
        settings(epochs=1, threads=before + 1),
        molecules[:2],
        molecules[2:3],
        tmp_path,
        seed=0,
        progress=lambda row: seen.append(torch.get_num_threads()),
    )
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


# -------------------------------------------------------------------------------------------- files


def test_log_and_picture(tmp_path, molecules):
    rows = []
    chosen = settings(epochs=5, validation_every=2)
    result = train(MODEL, chosen, molecules[:9], molecules[9:], tmp_path, seed=0, progress=rows.append)
    with (tmp_path / "log.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert tuple(logged[0]) == COLUMNS
    assert [int(row["epoch"]) for row in logged] == [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["epochs"] == 5 for row in rows)
    assert all(row["train_stress_rmse_MPa"] == "" for row in logged), "no stress in the data"
    assert [row["valid_force_rmse_eV_per_A"] != "" for row in logged] == [False, True, False, True, True]
    kept = [int(row["epoch"]) for row in logged if row["best"] == "1"][-1]
    assert kept == result.best["epoch"]
    value = errors_on(result.model, molecules[9:]).rmse("energy") * 1000
    assert float(logged[kept - 1]["valid_energy_rmse_meV_per_atom"]) == pytest.approx(value, rel=1e-5)
    assert (tmp_path / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "learning_curve.png",
        "log.csv",
        "weights.pt",
    ]


def test_members_differ_by_their_seeds_only(tmp_path, molecules):
    """The first member is the network that one trains alone; a finished member is kept; warm starts pair up."""
    data = molecules[:6], molecules[9:]
    backend, labels = GaussianMoments(), Labels(*data)
    rows = []

    def trained(epochs, *arguments):
        paths = train_networks(backend, 3, TrainingTable(MODEL, settings(epochs=epochs)), labels, *arguments)
        return paths, [load_weights(path) for path in paths]

    weights, cold = trained(2, tmp_path / "cold", 4, None, rows.append)
    assert [(row["epoch"], row["epochs"]) for row in rows] == [(k, 6) for k in range(1, 7)]
    assert weights == [folder / "weights.pt" for folder in member_folders(tmp_path / "cold", 3)]
    assert same_weights(cold[0], train(MODEL, settings(epochs=2), *data, tmp_path / "alone", 4).model)
    assert not same_weights(cold[1], cold[2])
    assert not same_weights(cold[0], cold[1])
    (tmp_path / "cold" / "member_2" / "checkpoint.pt").unlink()
    rows.clear()
    _, again = trained(2, tmp_path / "cold", 4, None, rows.append)
    assert [row["epoch"] for row in rows] == [5, 6]
    assert all(same_weights(a, b) for a, b in zip(cold, again, strict=True))
    _, warm = trained(1, tmp_path / "warm", 5, weights)
    alone = train(MODEL, settings(epochs=1), *data, tmp_path / "warm0", 5, initial=weights[0])
    assert same_weights(warm[0], alone.model)
    assert member_folders(tmp_path, 1) == [tmp_path]


def test_a_finished_training_tells_its_summary_and_gives_lost_weights_again(tmp_path, molecules):
    """No epoch is trained or reported."""
    backend, table = GaussianMoments(), TrainingTable(MODEL, settings(epochs=5, validation_every=2))
    labels, rows = Labels(molecules[:6], molecules[9:]), []
    path = backend.train(labels, table, tmp_path, None, 3, rows.append)
    found, content = backend.summary(tmp_path), path.read_bytes()
    validated = [row for row in rows if row.get("valid_force_mae_eV_per_A") is not None]
    kept = min(validated, key=lambda r: r["valid_energy_mae_meV_per_atom"] / 1000 + r["valid_force_mae_eV_per_A"])
    assert {**found.best, "epochs": 5} == kept
    assert found.epochs == 5
    assert found.seconds == pytest.approx(sum(row["seconds"] for row in rows))
    path.unlink()
    assert backend.train(labels, table, tmp_path, None, 3, pytest.fail) == path
    assert path.read_bytes() == content
    assert backend.summary(tmp_path) == found


def drawn(train_values: list[float], valid_values: list[float]) -> Axes:
    """The panel of a training with these energy RMSEs, the last epoch kept."""
    axes = Figure().subplots()
    key = "energy_rmse_meV_per_atom"
    rows = [{"epoch": k, f"train_{key}": a, "best": 1} for k, a in enumerate(train_values, 1)]
    for row, value in zip(rows, valid_values, strict=True):
        row[f"valid_{key}"] = value
    _draw_panel(axes, rows, key)
    return axes


def test_learning_curves_have_an_epoch_axis_that_is_linear_and_plain_numbers():
    narrow, wide = drawn([0.5, 0.3, 0.2], [0.6, 0.4, 0.3]), drawn([30.0, 2.0, 0.2], [40.0, 4.0, 0.4])
    for axes, scale in ((narrow, "linear"), (wide, "log")):
        assert axes.get_xscale() == "linear"
        assert axes.get_yscale() == scale
        assert [line.get_label() for line in axes.lines] == ["training", "validation", "kept: epoch 3"]
        light, dark = (to_rgb(line.get_color()) for line in axes.lines[:2])
        assert sum(light) > sum(dark) + 0.5, "grey print must tell them apart"
        assert axes.lines[0].get_linewidth() < axes.lines[1].get_linewidth()
    assert narrow.get_ylim()[0] == 0.0
    low, high = wide.get_ylim()
    ticks = [value for value in wide.yaxis.get_major_locator()() if low <= value <= high]
    assert {"1", "10", "0.3"} <= {wide.yaxis.get_major_formatter()(value, 0) for value in ticks}


def test_a_learning_curve_without_validation_is_not_drawn(tmp_path):
    draw([{"epoch": 1, "train_energy_rmse_meV_per_atom": 1.0}], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


def test_one_validation_structure_and_one_epoch(tmp_path, molecules):
    result = train(MODEL, settings(epochs=1), molecules[:1], molecules[1:2], tmp_path, seed=0)
    assert result.best["epoch"] == 1
    assert (tmp_path / "learning_curve.png").exists()


# ------------------------------------------------------------------------------------------- resume

KILLED = """
import os, signal, sys
from pathlib import Path
from ubmd.data.structures import read_structures
from ubmd.settings import ModelSettings, TrainingSettings
from ubmd.potentials.gmnn.trainer import train

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
model = ModelSettings.model_validate_json(sys.argv[3])
settings = TrainingSettings.model_validate_json(sys.argv[4])
data = read_structures(folder / "data.extxyz")
kill = lambda row: os.kill(os.getpid(), signal.SIGKILL) if row["epoch"] == stop else None
train(model, settings, data[:9], data[9:], folder / "killed", 7, progress=kill)
"""


def test_killed_training_resumes_with_the_same_bits(tmp_path, molecules):
    """kill -9 before the first checkpoint, after it, and between later ones; then the rest, and compare all bits."""
    chosen = settings(epochs=11, checkpoint_every=3, precision="float32")
    reference = train(MODEL, chosen, molecules[:9], molecules[9:], tmp_path / "reference", seed=7)
    write_structures(tmp_path / "data.extxyz", molecules)
    for stop in (2, 4, 8):
        arguments = [str(tmp_path), str(stop), MODEL.model_dump_json(), chosen.model_dump_json()]
        process = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=120)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "weights.pt").exists()
    epochs = []
    resumed = train(
        MODEL,
        chosen,
        molecules[:9],
        molecules[9:],
        tmp_path / "killed",
        seed=7,
        progress=lambda row: epochs.append(row["epoch"]),
    )
    assert epochs == [7, 8, 9, 10, 11], "it must go on from the checkpoint of epoch 6"
    assert same_weights(reference.model, resumed.model)

    def numbers(folder: Path) -> list[list[str]]:
        with (folder / "log.csv").open(newline="") as file:
            return [line[:1] + line[2:] for line in csv.reader(file)]  # all but the seconds

    assert numbers(tmp_path / "killed") == numbers(tmp_path / "reference")


def test_finished_training_is_only_looked_up(tmp_path, molecules):
    first = train(MODEL, settings(), molecules[:9], molecules[9:], tmp_path, seed=0)
    called = []
    again = train(
        MODEL, settings(checkpoint_every=1), molecules[:9], molecules[9:], tmp_path, seed=0, progress=called.append
    )
    assert not called
    assert same_weights(first.model, again.model)
    assert first.best == again.best


def test_checkpoint_of_another_training_is_refused(tmp_path, molecules):
    def run(changes: dict | None = None, count: int = 9, seed: int = 0, fresh: bool = False) -> None:
        chosen = settings(epochs=2, **(changes or {}))
        train(MODEL, chosen, molecules[:count], molecules[9:], tmp_path, seed=seed, fresh=fresh)

    run()
    with pytest.raises(TrainingError, match=r"training\.force_weight was 4\.0, now 2\.0\); start again with --fresh"):
        run({"force_weight": 2.0})
    with pytest.raises(TrainingError, match="the training set has changed"):
        run(count=8)
    with pytest.raises(TrainingError, match="seed was 0, now 1"):
        run(seed=1)
    run(seed=1, fresh=True)
    run(seed=1)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match=r"checkpoint\.pt is not a checkpoint file of ubmd"):
        run(seed=1)


# --------------------------------------------------------------------------------------- warm start


def test_warm_start_goes_on_from_the_earlier_model(tmp_path, molecules):
    """c, sigma, mu and weights go on: with vanishing learning rates nothing moves although the data are new."""
    train(MODEL, settings(epochs=40), molecules[:6], molecules[9:], tmp_path / "old", seed=0)
    old = load_weights(tmp_path / "old" / "weights.pt")
    still = train(
        MODEL,
        settings(warm_learning_rate_factor=1e-300, warm_keep=1.0),
        molecules[:9],
        molecules[9:],
        tmp_path / "still",
        seed=1,
        initial=tmp_path / "old" / "weights.pt",
        epochs=2,
    )
    assert same_weights(old, still.model)
    assert len(still.history) == 2
    warm = train(
        MODEL,
        settings(),
        molecules[:9],
        molecules[9:],
        tmp_path / "warm",
        seed=1,
        initial=tmp_path / "old" / "weights.pt",
        epochs=10,
    )
    cold = train(MODEL, settings(), molecules[:9], molecules[9:], tmp_path / "cold", seed=1, epochs=10)
    assert torch.equal(warm.model.constant, old.constant)
    assert warm.best["valid_force_rmse_eV_per_A"] < cold.best["valid_force_rmse_eV_per_A"]


def test_warm_start_forgets_a_share_of_the_weights(tmp_path, molecules):
    """W and B become keep·old + sqrt(1 - keep^2)·fresh; c, sigma, mu and biases stay."""
    train(MODEL, settings(epochs=3), molecules[:6], molecules[9:], tmp_path / "old", seed=0)
    initial = tmp_path / "old" / "weights.pt"
    chosen = settings(warm_learning_rate_factor=1e-300, warm_keep=0.6)
    start = train(MODEL, chosen, molecules, molecules[9:], tmp_path / "new", seed=1, initial=initial, epochs=1).model
    old = load_weights(initial)
    fresh = GaussianMomentNetwork(old.elements, MODEL, seed=1).to_network_dtype(torch.float64)
    for name, value in start.state_dict().items():
        before = old.state_dict()[name]
        mixed = "weight" in name or "radial" in name
        expected = 0.6 * before + 0.8 * fresh.state_dict()[name] if mixed else before
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
    assert not torch.equal(start.radial, old.radial)


def test_warm_start_refuses_what_does_not_fit(tmp_path, molecules, crystals):
    train(MODEL, settings(epochs=1), molecules[:2], molecules[2:3], tmp_path / "old", seed=0)
    initial = tmp_path / "old" / "weights.pt"

    def run(model: ModelSettings, data: list[Atoms], path: Path = initial) -> None:
        train(model, settings(epochs=1), data[:2], data[2:3], tmp_path / "new", seed=0, initial=path)

    with pytest.raises(ModelError, match="does not contain the element Cu of the new data; train from scratch"):
        run(MODEL, crystals)
    with pytest.raises(ModelError, match=r"has cutoff = 4\.0, the settings have 5\.0"):
        run(MODEL.model_copy(update={"cutoff": 5.0}), molecules)
    with pytest.raises(ModelError, match="There is no weights file"):
        run(MODEL, molecules, tmp_path / "missing.pt")
    with pytest.raises(ModelError, match="is not a weights file of ubmd"):
        run(MODEL, molecules, tmp_path / "old" / "checkpoint.pt")


# ----------------------------------------------------------------------------------------- refusals


def test_divergence_says_what_to_do(tmp_path, molecules):
    with pytest.raises(TrainingError, match=r"not finite in epoch \d: lower training\.learning_rate \(now 1e\+200\)"):
        train(MODEL, settings(learning_rate=1e200), molecules[:8], molecules[8:], tmp_path, seed=0)


def test_unusable_data_are_refused(tmp_path, molecules):
    with pytest.raises(DataError, match="validation set is empty"):
        train(MODEL, settings(), molecules, [], tmp_path, seed=0)
    with pytest.raises(DataError, match="training set, structure 1: no energy"):
        train(MODEL, settings(), [molecules[0], molecule("H2O")], molecules, tmp_path, seed=0)
    with pytest.raises(DataError, match=r"contain C, which is not in model\.elements"):
        train(MODEL.model_copy(update={"elements": ("H", "O")}), settings(), molecules, molecules, tmp_path, seed=0)


def test_split_is_a_partition_that_follows_the_seed(molecules):
    training, validation = split(molecules, 0.25, seed=4)
    assert len(validation) == 3
    assert {id(atoms) for atoms in [*training, *validation]} == {id(atoms) for atoms in molecules}
    assert [id(a) for a in split(molecules, 0.25, seed=4)[1]] == [id(a) for a in validation]
    assert any([id(a) for a in split(molecules, 0.25, seed=s)[1]] != [id(a) for a in validation] for s in (5, 6))
    assert [len(part) for part in split(molecules[:2], 0.01, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="One structure cannot be split"):
        split(molecules[:1], 0.5, seed=0)


def test_chunks_of_a_mini_batch_add_up(tmp_path, molecules, monkeypatch):
    """Gradients of the chunks are summed: the same training as in one piece, up to rounding."""
    results = []
    for pairs in (10**9, 40):
        monkeypatch.setattr("ubmd.data.graph.PAIRS_PER_CHUNK", pairs)
        results.append(train(MODEL, settings(epochs=3), molecules[:9], molecules[9:], tmp_path / str(pairs), seed=0))
    whole, pieces = (result.history[-1] for result in results)
    assert whole["loss"] == pytest.approx(pieces["loss"], rel=1e-8)
    assert whole["valid_force_rmse_eV_per_A"] == pytest.approx(pieces["valid_force_rmse_eV_per_A"], rel=1e-8)


def test_the_only_mini_batch_is_collated_once(tmp_path, molecules, monkeypatch):
    """If all structures are one mini-batch, it is the same in every epoch; otherwise each has its own."""
    sizes: list[int] = []

    def counting(graphs: list[Graph]) -> Batch:
        sizes.append(len(graphs))
        return collate(graphs)

    monkeypatch.setattr("ubmd.data.graph.collate", counting)
    train(MODEL, settings(epochs=3, batch_size=9), molecules[:9], molecules[9:], tmp_path / "one", seed=0)
    assert sizes == [3, 9]
    train(MODEL, settings(epochs=2, batch_size=8), molecules[:9], molecules[9:], tmp_path / "two", seed=0)
    assert sizes[2:] == [3, 8, 1, 8, 1]
