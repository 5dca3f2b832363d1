"""``model.kind = "mace"`` with the real package, in a Python of its own.

UBMD_TEST_MACE names that Python: ``python -m venv mace-env && mace-env/bin/pip install mace-torch``, then
``UBMD_TEST_MACE=mace-env/bin/python pytest -m '' tests/learning/test_mace.py``; without ``-m ''``, and in CI, the tests
marked as slow are left out: its Python takes ten seconds to start. What can be tested without it is in
`tests/unit/test_mace_process.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
import tomli_w
import torch
from alloy import alloy
from ase import Atoms
from ase.build import bulk
from bond_scan import PULLED, margin, sets
from boxes_in_lammps import said_by_lammps
from command_line import UBMD
from processes import HELPERS, is_alive, wait_for
from typer.testing import CliRunner

import ubmd
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.graph import build_graph, scatter_forces
from ubmd.errors import ModelError, SettingsError
from ubmd.files import file_hash
from ubmd.learning import RunFolder, run
from ubmd.potentials.history import read
from ubmd.potentials.interface import Labels, RawModule, TrainingTable
from ubmd.potentials.mace.backend import Mace
from ubmd.potentials.record import read_record
from ubmd.potentials.wrapping import wrap
from ubmd.settings import ModelSettings, RunSettings, TrainingSettings, UncertaintySettings, load_settings

PYTHON = os.environ.get("UBMD_TEST_MACE", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="UBMD_TEST_MACE does not name a Python with MACE (pip install mace-torch, in one of its own)"
)
ARGUMENTS = {"num_channels": 4, "max_L": 1, "correlation": 2, "max_ell": 2, "r_max": 3.5, "MLP_irreps": "4x0e"}
TRAINING = {"epochs": 4, "batch_size": 4, "precision": "float64", "threads": 1}


def labelled(seed: int) -> Atoms:
    """Four or eight atoms with EMT labels."""
    return alloy(seed, 1 + seed % 2)


def settings(folder: Path, model: dict | None = None, training: dict | None = None) -> Path:
    """A settings file of `ubmd train` beside the labels."""
    values = {
        "training_file": "train.extxyz",
        "validation_file": "valid.extxyz",
        "output_dir": str(folder / "out"),
        "model": {"kind": "mace", "python": PYTHON, **({"arguments": ARGUMENTS} if model is None else model)},
        "training": TRAINING | (training or {}),
    }
    (folder / "train.toml").write_text(tomli_w.dumps(values))
    return folder / "train.toml"


def ubmd_train(*words: object) -> str:
    done = CliRunner().invoke(app, ["train", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels, and a tiny network that was trained on them from scratch by `ubmd train`."""
    folder = tmp_path_factory.mktemp("mace")
    write_structures(folder / "train.extxyz", [labelled(seed) for seed in range(8)])
    write_structures(folder / "valid.extxyz", [labelled(seed) for seed in range(8, 12)])
    said = ubmd_train(settings(folder))
    assert "kept: epoch 4 of 4" in said
    assert "validation (4 structures)" in said
    assert "before the constants of the elements were fitted" in said
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return folder / "out" / "mace.model"


def backend(checkpoint: Path, **keys: object) -> Mace:
    made = Mace()
    values = {"kind": "mace", "python": PYTHON, "checkpoint": checkpoint, **keys}
    made.configure(ModelSettings.model_validate(values), Path("/"))
    return made


FEATURES = ["nodes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("readout", "last-layer"))]


@pytest.fixture(scope="module", params=FEATURES)
def converted(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> RawModule:
    target = tmp_path_factory.mktemp(request.param) / "module.pt"
    made = backend(checkpoint, features=request.param)
    return made.convert(checkpoint, UncertaintySettings(projections=16, seed=3), target)


def probes() -> list[Atoms]:
    """A molecule, a cell smaller than the cutoff, a triclinic one, and one atom alone."""
    places = [[0.0, 0.0, 0.0], [2.3, 0.1, 0.0], [0.1, 2.4, 0.2], [2.2, 2.3, 0.3], [0.2, 0.1, 2.5], [2.4, 0.0, 2.3]]
    molecule = Atoms("Cu3AuCu2", positions=places)
    small = Atoms("CuAu", positions=[[0.0, 0.0, 0.0], [1.4, 1.2, 1.9]], cell=[2.7, 2.6, 3.7], pbc=True)
    triclinic = bulk("Cu", cubic=True).repeat((2, 1, 1))
    triclinic.symbols[[1, 4]] = "Au"
    triclinic.set_cell(triclinic.cell.array @ [[1.0, 0.2, 0.0], [0.0, 0.95, 0.1], [0.15, 0.0, 1.05]], scale_atoms=True)
    triclinic.rattle(0.1, seed=1)
    return [molecule, small, triclinic, Atoms("Au", positions=[[0.0, 0.0, 0.0]])]


def in_its_python(script: str, *words: Path) -> None:
    """Run a helper in the Python of MACE."""
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    subprocess.run([PYTHON, HELPERS / script, *words], check=True, env=outside, capture_output=True)


def said_by_mace(checkpoint: Path, structures: list[Atoms], folder: Path) -> dict[str, np.ndarray]:
    write_structures(folder / "probes.xyz", structures)
    in_its_python("mace_oracle.py", checkpoint, folder / "probes.xyz", folder / "out.npz")
    return dict(np.load(folder / "out.npz"))


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What MACE itself says of the probes."""
    return said_by_mace(checkpoint, probes(), tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="module")
def calculator(converted: RawModule, folder: Path) -> ubmd.Calculator:
    sets = [list(ase.io.iread(folder / name)) for name in ("train.extxyz", "valid.extxyz")]
    path = Path(converted.module).with_name("model.pt")
    wrap(converted, *sets, UncertaintySettings(projections=16), path, refit=False)
    return ubmd.Calculator(path)


def test_energies_forces_and_virials_are_those_of_mace(
    calculator: ubmd.Calculator, oracle: dict[str, np.ndarray]
) -> None:
    for k, atoms in enumerate(probes()):
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(float(oracle[f"energy_{k}"]), abs=1e-10, rel=0.0)
        np.testing.assert_allclose(atoms.get_forces(), oracle[f"forces_{k}"], atol=1e-10, rtol=0.0)
        assert k == 3 or np.abs(atoms.get_forces()).max() > 0.01  # a lone atom has none
        if atoms.pbc.all():
            virial = -atoms.get_stress() * atoms.get_volume()
            np.testing.assert_allclose(virial, oracle[f"virial_{k}"], atol=1e-10, rtol=0.0)


def test_features_are_derivatives_by_weights(
    converted: RawModule, checkpoint: Path, oracle: dict[str, np.ndarray]
) -> None:
    """Those in closed form against autograd on MACE's own forward; sketches with the module's own random numbers."""
    if converted.record["features"] == "nodes":
        pytest.skip("node features are no derivatives")
    module = torch.jit.load(str(converted.module))
    state = {name: value.numpy() for name, value in module.state_dict().items() if name.startswith("features.")}
    for k, atoms in enumerate(probes()[:3]):
        graph = build_graph(atoms, converted.elements, converted.cutoff)
        with torch.no_grad():
            phi = module(graph.species, graph.edge_index, graph.edge_vector, len(atoms))[1].numpy()
        first, hidden, last = (oracle[f"{name}_{k}"] for name in ("first", "hidden", "last"))
        if converted.record["features"] == "last-layer":
            expected = np.concatenate([first, last], 1)
        else:
            inputs, outputs = state["features.1.inputs"], state["features.1.outputs"]
            products = inputs[:, None] * outputs[None]  # [inputs, outputs, p]
            expected = first @ state["features.0.projection"] + last @ state["features.1.projection"]
            expected += np.tensordot(hidden.reshape(-1, *products.shape[:2]), products, 2)
        np.testing.assert_allclose(phi, expected, atol=1e-12 + 1e-10 * np.abs(expected).max())


def test_gradients_of_the_uncertainty_are_derivatives(calculator: ubmd.Calculator) -> None:
    for atoms in (probes()[0], probes()[2]):
        atoms.calc = calculator
        bias = calculator.get_bias_forces(atoms).copy()
        found = np.zeros_like(bias)
        for atom, axis in np.ndindex(*bias.shape):
            values = []
            for step in (1e-4, -1e-4):
                moved = atoms.copy()
                moved.positions[atom, axis] += step
                moved.calc = calculator
                moved.get_potential_energy()
                values.append(calculator.results["uncertainty"])
            found[atom, axis] = (values[0] - values[1]) / 2e-4
        assert np.abs(bias).max() > 1e-4
        np.testing.assert_allclose(bias, found, atol=1e-6 * np.abs(bias).max())


def close(value: object, expected: object) -> bool:
    """To 1e-10 of the largest component."""
    expected = np.asarray(expected)
    return bool(np.abs(np.asarray(value) - expected).max() <= 1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_lammps_says_what_mace_says(
    calculator: ubmd.Calculator, oracle: dict[str, np.ndarray], ranks: int, tmp_path: Path
) -> None:
    """Energies, forces and virials are MACE's own, uncertainties and bias those of Python: messages pass all faces."""
    force, stress, structures = 0.25, 0.3, probes()[:3]
    path = calculator.evaluator.path
    found = said_by_lammps(path, structures, ["Cu", "Au"], ranks, force, stress, tmp_path)
    for k, (said, atoms) in enumerate(zip(found, structures, strict=True)):
        assert close(said.energy, oracle[f"energy_{k}"])
        assert close(said.forces, oracle[f"forces_{k}"])
        expected, gradient, strain = calculator.evaluator.predict_with_gradient(atoms)
        assert close(said.u, expected.u)
        assert close(said.atomic_u, expected.atomic_u)
        assert close(said.scale, np.linalg.norm(expected.forces) / np.linalg.norm(gradient))
        assert close(said.bias, force * said.scale * gradient)
        assert np.linalg.norm(said.bias) == pytest.approx(force * np.linalg.norm(said.forces))
        if atoms.pbc.all():
            virial = oracle[f"virial_{k}"]
            assert close(said.virial, virial[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]])
            assert close(said.bias_virial, stress * said.stress_scale * strain)
            assert np.linalg.norm(said.bias_virial) == pytest.approx(stress * np.linalg.norm(said.virial))


def test_the_file_runs_where_mace_is_not_installed(
    calculator: ubmd.Calculator, oracle: dict[str, np.ndarray], tmp_path: Path
) -> None:
    atoms = probes()[2]
    write_structures(tmp_path / "cell.xyz", [atoms])
    command = [sys.executable, HELPERS / "without_mace.py", calculator.evaluator.path, tmp_path / "cell.xyz"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert close([found["python"], found["lammps"]], [oracle["energy_2"]] * 2)
    assert close(found["u"], calculator.evaluator.predict_one(atoms).u)
    assert close(found["bias"], calculator.get_bias_forces(atoms))


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of two iterations."""
    tmp_path = tmp_path_factory.mktemp("loop")
    box = alloy(0, 2)
    box.calc = None
    write_structures(tmp_path / "start.extxyz", [box])
    values = {
        "run_dir": str(tmp_path / "run"),
        "start": {"file": "start.extxyz", "count": 4, "displacement": 0.1},
        "reference": {"calculator": "ase.calculators.emt:EMT"},
        "model": {"kind": "mace", "python": PYTHON, "arguments": ARGUMENTS},
        "training": {"epochs": 3, "batch_size": 2},
        "md": {"replicas": 1, "steps": 20, "timestep": 2.0, "frames_every": 5},
        "bias": {"force": 0.5, "window": 4},
        "selection": {"batch": 2},
        "loop": {"labels": 6, "warm_epochs": 2, "threshold": 1000.0},
        "workers": {"processes": 1},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    return RunFolder(run(load_settings(tmp_path / "run.toml", RunSettings), tmp_path))


@pytest.mark.slow
def test_the_loop_trains_it_again_and_again(loop: RunFolder) -> None:
    """The second network starts from the first one."""
    record = read_record(loop.model)
    assert record is not None
    assert (record["model"], record["precision"], record["n_training"]) == ("mace", "float32", 5)
    first, second = (loop.iteration(k) / "train" for k in (0, 1))
    asked = json.loads((second / "mace" / "train.request.json").read_text())["arguments"]
    assert f"--foundation_model={first / 'mace.model'}" in asked
    assert "--max_num_epochs=2" in asked
    assert not list(second.glob("mace/**/*.pt"))  # states and networks of the training are gone
    assert [row["epoch"] for row in read(first / "log.csv")] == [1, 2, 3]
    assert (second / "learning_curve.png").exists()
    done = CliRunner().invoke(app, ["report", str(loop.path)])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_an_iteration_that_is_missing_is_made_again_the_same(loop: RunFolder) -> None:
    before = loop.dataset.read_bytes()
    shutil.rmtree(loop.iteration(1))
    run(load_settings(loop.path.parent / "run.toml", RunSettings), loop.path.parent)
    assert loop.dataset.read_bytes() == before


def test_the_record_says_what_it_is(folder: Path, checkpoint: Path) -> None:
    record = read_record(folder / "out" / "model.pt")
    assert record is not None
    assert record["model"] == "mace"
    assert (record["layers"], record["fixed_precision"], record["precision"]) == (2, True, "float64")
    assert (record["elements"], record["cutoff"]) == (["Cu", "Au"], 3.5)
    assert record["backend"]["checkpoint"] == file_hash(checkpoint)
    assert record["backend"]["version"]
    assert not any(name.partition(".")[0] in ("mace", "e3nn") for name in sys.modules)


@pytest.mark.slow
def test_fine_tuning_starts_from_the_checkpoint(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Before the first epoch, MACE's errors of validation are those of the checkpoint; energies have another zero."""
    sets = []
    for name in ("train.extxyz", "valid.extxyz"):
        structures = list(ase.io.iread(folder / name))
        for atoms in structures:
            atoms.calc.results["energy"] += 20.0 * atoms.symbols.count("Cu") - 3.0 * atoms.symbols.count("Au")
        write_structures(tmp_path / name, structures)
        sets.append(structures)
    model = {"checkpoint": str(checkpoint), "arguments": {"lr": 1e-3}}
    ubmd_train(settings(tmp_path, model, {"epochs": 2}))
    log = (tmp_path / "out/mace/results/ubmd_run-0_train.txt").read_text().splitlines()
    before = next(row for row in map(json.loads, log) if row["mode"] == "eval" and row["epoch"] is None)
    calculator = ubmd.Calculator(folder / "out" / "model.pt")
    differences = [calculator.get_forces(atoms) - atoms.get_forces() for atoms in sets[1]]
    assert before["rmse_f"] == pytest.approx(float(np.sqrt(np.mean(np.concatenate(differences) ** 2))), rel=1e-4)
    assert before["rmse_e_per_atom"] < 3.0  # of 14.25 eV per atom that were added
    tuned = ubmd.Calculator(tmp_path / "out" / "model.pt")
    assert abs(tuned.get_potential_energy(sets[1][0]) - sets[1][0].get_potential_energy()) < 3.0 * len(sets[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["refit", "none"])
def test_weights_can_stay(mode: str, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    structures = [labelled(seed) for seed in range(20, 26)]
    for atoms in structures:
        atoms.calc.results["energy"] += 5.0 * len(atoms)
    table = TrainingTable(ModelSettings(kind="mace"), TrainingSettings(mode=mode))
    made = backend(checkpoint)
    found = made.train(Labels(structures[:4], structures[4:]), table, tmp_path / "out", None, 0, None)
    raw = made.raw_module([found], UncertaintySettings())
    atoms = structures[5]
    graph = build_graph(atoms, raw.elements, raw.cutoff)
    with torch.no_grad():
        energy = torch.jit.load(str(raw.module))(graph.species, graph.edge_index, graph.edge_vector, len(atoms))[0]
    before = ubmd.Calculator(folder / "out" / "model.pt").get_potential_energy(atoms)
    change = (float(energy.sum()) - before) / len(atoms)
    assert change == pytest.approx(0.0, abs=1e-9) if mode == "none" else 3.0 < change < 7.0
    seen = found.stat().st_mtime_ns
    assert made.train(Labels(structures[:4], structures[4:]), table, tmp_path / "out", None, 0, None) == found
    assert found.stat().st_mtime_ns == seen  # it is sealed


@pytest.mark.slow
def test_a_killed_training_resumes_and_leaves_nothing_running(folder: Path, tmp_path: Path) -> None:
    for name in ("train.extxyz", "valid.extxyz"):
        shutil.copy(folder / name, tmp_path)
    file = settings(tmp_path, training={"epochs": 16})
    driver = subprocess.Popen([*UBMD, "train", str(file)], stdout=subprocess.DEVNULL)
    log = tmp_path / "out/mace/results/ubmd_run-0_train.txt"
    try:
        assert wait_for(lambda: log.exists() and '"epoch": 3, "head"' in log.read_text(), 600.0)
        trainers = training_processes(tmp_path)
        assert trainers
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert wait_for(lambda: not any(is_alive(process) for process in trainers), 10.0)
    epochs_before = evaluated(log)
    ubmd_train(file)
    epochs = evaluated(log)[len(epochs_before) :]
    assert epochs[0] > 0  # not from the beginning
    assert epochs[-1] == 15
    assert ubmd.Calculator(tmp_path / "out" / "model.pt").get_forces(probes()[2]).shape == (8, 3)


def evaluated(log: Path) -> list[int]:
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return [row["epoch"] for row in rows if row["mode"] == "eval" and row["epoch"] is not None]


def training_processes(folder: Path) -> list[int]:
    """Processes with a request in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(word.endswith("train.request.json") and word.startswith(str(folder)) for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_wrap_makes_a_model_file_of_a_checkpoint(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    named = tmp_path / "MACE-OFF23_small.model"
    shutil.copy(checkpoint, named)
    arguments = named, folder / "train.extxyz", "--held-out", folder / "valid.extxyz", "--out", tmp_path / "model.pt"
    done = CliRunner().invoke(app, ["wrap", *map(str, arguments), "--python", PYTHON, "--features", "last-layer"])
    assert done.exit_code == 0, done.output
    assert "licence academic only (ASL): elements Cu Au; cutoff 3.5 Å, 2 layers; float64; 8 features" in done.output
    assert "fitted to the 8 training labels" in done.output
    record = read_record(tmp_path / "model.pt")
    assert record is not None
    assert record["backend"]["licence"] == "academic only (ASL)"
    # the training has fitted the constants already, to the same labels
    assert record.get("constants", {}) == pytest.approx(dict.fromkeys(record.get("constants", {}), 0.0), abs=1e-8)


@pytest.mark.slow
def test_what_cannot_be_used_is_said_in_one_sentence(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "state.model")
    made = backend(checkpoint)
    with pytest.raises(ModelError, match="holds no network but weights"):
        made.convert(tmp_path / "state.model", UncertaintySettings(), tmp_path / "module.pt")
    with pytest.raises(ModelError, match=r"model.pt is TorchScript .* not a checkpoint of MACE"):
        made.convert(folder / "out" / "model.pt", UncertaintySettings(), tmp_path / "module.pt")
    words = str(settings(folder, {"arguments": ARGUMENTS | {"num_chanels": 8}}))
    done = CliRunner().invoke(app, ["train", words])
    assert done.exit_code == 1
    assert "mace_run_train has no argument 'num_chanels'; did you mean 'num_channels'?" in done.output
    done = CliRunner().invoke(app, ["train", str(settings(folder, {"arguments": ARGUMENTS | {"lr": "fast"}}))])
    assert done.exit_code == 1
    assert "argument --lr: invalid float value: 'fast' (all of it is in " in done.output


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_its_own_python_has_to_see_the_gpu(checkpoint: Path) -> None:
    made = backend(checkpoint)
    made.check_device("cpu")
    with pytest.raises(SettingsError, match=r"training.device = 'cuda' cannot be used: torch .* finds no GPU"):
        made.check_device("cuda")


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with networks of other shapes."""
    folder = tmp_path_factory.mktemp("variants")
    in_its_python("mace_variants.py", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "three", "plain repulsion", "repulsion", "last readout", "density"])
def test_other_networks_are_converted_exactly(name: str, variants: Path, tmp_path: Path) -> None:
    """Close atoms, so that a repulsion counts; total energies of heavy atoms."""
    made = backend(variants / f"{name}.model", features="nodes")
    raw = made.convert(variants / f"{name}.model", UncertaintySettings(), tmp_path / "module.pt")
    assert raw.layers == {"one": 1, "three": 3}.get(name, 2)
    atoms = Atoms("AuOHHO", positions=[[0, 0, 0], [1.5, 0, 0], [0, 1.1, 0], [0.8, 0.9, 1.0], [2.5, 2.0, 0.4]])
    expected = said_by_mace(variants / f"{name}.model", [atoms], tmp_path)
    graph = build_graph(atoms, raw.elements, raw.cutoff)
    edge = graph.edge_vector.clone().requires_grad_(True)
    energy = torch.jit.load(str(raw.module))(graph.species, graph.edge_index, edge, len(atoms))[0].sum()
    assert energy.item() == pytest.approx(float(expected["energy_0"]), abs=1e-9, rel=0.0)
    forces = scatter_forces(graph.edge_index, torch.autograd.grad(energy, edge)[0], len(atoms)).numpy()
    np.testing.assert_allclose(forces, expected["forces_0"], atol=1e-10 * (1.0 + np.abs(forces).max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features", "words"),
    [
        ("heads", "nodes", "it has the heads pt_head, mine; choose one with mace_select_head"),
        ("tanh", "readout", "features = 'readout' needs a readout with SiLU"),
    ],
)
def test_networks_that_do_not_fit_are_refused(
    name: str, features: str, words: str, variants: Path, tmp_path: Path
) -> None:
    made = backend(variants / f"{name}.model", features=features)
    with pytest.raises(ModelError, match=words):
        made.convert(variants / f"{name}.model", UncertaintySettings(), tmp_path / "module.pt")


@pytest.mark.slow
@pytest.mark.parametrize("features", ["nodes", "readout", "last-layer"])
def test_what_is_pulled_away_looks_unknown(features: str, variants: Path, tmp_path: Path) -> None:
    """Features of random weights do."""
    tblite = pytest.importorskip("tblite.ase")
    reference = tblite.TBLite(method="GFN2-xTB", verbosity=0)
    labels = sets(reference)
    uncertainty = UncertaintySettings(projections=32)
    made = backend(variants / "ethanol.model", features=features)
    raw = made.convert(variants / "ethanol.model", uncertainty, tmp_path / "module.pt")
    wrap(raw, *labels, uncertainty, tmp_path / "model.pt")
    for bond in PULLED:
        assert margin(ubmd.Model(tmp_path / "model.pt"), *labels, bond) > 1.0


@pytest.mark.slow
def test_constants_of_a_float32_network_keep_their_digits(variants: Path, tmp_path: Path) -> None:
    """Gold has -40000.75 eV here: float32 would round a constant of 1 meV to none, or to 4 meV."""
    source, target = variants / "float32.model", tmp_path / "shifted.model"
    made = backend(source)
    made.environment.ask("shift", checkpoint=str(source), constants={"Au": 1e-3}, target=str(target))
    energies = []
    for path in (source, target):
        raw = made.convert(path, UncertaintySettings(), tmp_path / "module.pt")
        lone = torch.tensor([2]), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.float64), 1
        energies.append(float(torch.jit.load(str(raw.module))(*lone)[0].detach()))
    assert energies[1] - energies[0] == pytest.approx(1e-3, abs=1e-9)


def test_the_time_of_a_step_is_printed(calculator: ubmd.Calculator, capsys: pytest.CaptureFixture[str]) -> None:
    """No claim, a figure for the pages: of the triclinic cell of eight atoms."""
    atoms = probes()[2]
    times = {}
    for name, call in (("u", calculator.evaluator.predict), ("bias", calculator.evaluator.predict_with_gradient)):
        argument = [atoms] if name == "u" else atoms
        call(argument)
        begin = time.process_time()
        for _ in range(10):
            call(argument)
        times[name] = (time.process_time() - begin) / 10
    with capsys.disabled():
        print({name: f"{1000 * value:.1f} ms" for name, value in times.items()})
    assert max(times.values()) < 10.0
