"""`ubmd wrap` and ``model.kind = "file"``: TorchScript modules of others, without any package of theirs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from layered import Layered
from typer.testing import CliRunner

import ubmd
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.graph import build_graph
from ubmd.errors import ModelError, SettingsError
from ubmd.potentials.kinds import backend_files, backend_of
from ubmd.potentials.raw import fitted_constants, is_torchscript, read_raw, write_shifted
from ubmd.potentials.record import read_record
from ubmd.settings import ModelSettings, TrainSettings, make_settings

USAGE = Path(__file__).parents[2] / "python" / "USAGE.md"


def labelled(seed: int, repeat: int = 1) -> Atoms:
    """A shaken cell of copper and gold, smaller than the cutoff or not, with EMT labels."""
    atoms = bulk("Cu", cubic=True).repeat((repeat, 1, 1))
    atoms.symbols[seed % len(atoms)] = "Au"
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def save(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


def layered(path: Path, steps: int = 2, said: int = 0) -> Path:
    return save(Layered(["Cu", "Au"], 3.5, steps, said), path)


def ubmd_wrap(*words: object) -> str:
    done = CliRunner().invoke(app, ["wrap", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_structures(tmp_path / "data.extxyz", [labelled(seed, 1 + seed % 2) for seed in range(12)])
    return tmp_path / "data.extxyz"


def test_a_module_becomes_a_calibrated_model_file(data: Path, tmp_path: Path) -> None:
    out = ubmd_wrap(layered(tmp_path / "module.pt"), data, "--out", tmp_path / "model.pt", "--set", "alpha=0.4")
    assert "file: elements Cu Au; cutoff 3.5 Å, 2 layers; float64; 6 features" in out
    assert "fitted to the 8 training labels, eV per atom: Cu " in out
    assert "4 of the 12 structures" in out
    record = read_record(tmp_path / "model.pt")
    assert record is not None
    assert (record["model"], record["layers"], record["n_training"]) == ("file", 2, 8)
    assert record["uncertainty"]["energy"]["n_calibration"] == 4
    assert set(record["constants"]) == {"Cu", "Au"}
    atoms = labelled(30)
    atoms.calc = ubmd.Calculator(tmp_path / "model.pt")
    assert atoms.get_forces().shape == (4, 3)
    assert atoms.calc.results["uncertainty"] > 0.0


def test_energies_and_gradients_are_those_of_the_module(data: Path, tmp_path: Path) -> None:
    """Against the eager module on edges from ASE's own neighbour list, and central differences."""
    ubmd_wrap(layered(tmp_path / "module.pt"), data, "--out", tmp_path / "model.pt", "--no-refit")
    atoms = labelled(31)
    i, j, vectors = neighbor_list("ijD", atoms, 3.5)
    species = torch.tensor([0 if symbol == "Cu" else 1 for symbol in atoms.symbols])
    with torch.no_grad():
        pairs = torch.tensor(np.stack([i, j])), torch.tensor(vectors)
        expected = Layered(["Cu", "Au"], 3.5, 2)(species, *pairs, len(atoms))[0].sum()
    calculator = ubmd.Calculator(tmp_path / "model.pt", precision="double")
    atoms.calc = calculator
    assert atoms.get_potential_energy() == pytest.approx(float(expected), rel=1e-13)
    forces, bias = atoms.get_forces().copy(), calculator.get_bias_forces(atoms).copy()
    found = []
    for step in (1e-4, -1e-4):
        moved = atoms.copy()
        moved.positions[2, 1] += step
        moved.calc = calculator
        found.append((moved.get_potential_energy(), calculator.results["uncertainty"]))
    slopes = (np.array(found[0]) - found[1]) / 2e-4
    assert forces[2, 1] == pytest.approx(-slopes[0], rel=1e-6, abs=1e-8)
    assert bias[2, 1] == pytest.approx(slopes[1], rel=1e-5, abs=1e-9)


def test_constants_fit_training_labels_only(data: Path, tmp_path: Path) -> None:
    """Labels of another level of theory: 7 eV per copper atom and -5 eV per gold atom, in the training labels alone."""
    training, held_out = [labelled(seed) for seed in range(6)], [labelled(seed) for seed in range(6, 9)]
    raw = read_raw(layered(tmp_path / "module.pt"))
    before = fitted_constants(raw, training)
    for atoms in training:
        symbols = list(atoms.symbols)
        atoms.calc.results["energy"] += 7.0 * symbols.count("Cu") - 5.0 * symbols.count("Au")
    write_structures(tmp_path / "train.extxyz", training)
    write_structures(tmp_path / "held.extxyz", held_out)
    arguments = tmp_path / "module.pt", tmp_path / "train.extxyz", "--held-out", tmp_path / "held.extxyz"
    ubmd_wrap(*arguments, "--out", tmp_path / "model.pt")
    record = read_record(tmp_path / "model.pt")
    assert record is not None
    # every cell has three copper atoms and one of gold: the energy of four atoms is all that is known
    change = {element: record["constants"][element] - before[element] for element in ("Cu", "Au")}
    assert 3 * change["Cu"] + change["Au"] == pytest.approx(16.0, rel=1e-6)


def test_constants_of_elements_are_recovered(tmp_path: Path) -> None:
    raw = read_raw(layered(tmp_path / "module.pt"))
    write_shifted(raw, {"Cu": 1.5, "Au": -2.5}, tmp_path / "shifted.pt")
    shifted = read_raw(tmp_path / "shifted.pt")
    assert (shifted.elements, shifted.cutoff, shifted.layers) == (["Cu", "Au"], 3.5, 2)
    structures = [labelled(0), labelled(1, 2), labelled(2, 2)]
    module = torch.jit.load(str(tmp_path / "shifted.pt"))
    for atoms in structures:
        graph = build_graph(atoms, raw.elements, raw.cutoff)
        energy = module(graph.species, graph.edge_index, graph.edge_vector, len(atoms))[0].sum().detach()
        atoms.calc.results["energy"] = float(energy)
    found = fitted_constants(raw, structures)
    assert found["Cu"] == pytest.approx(1.5)
    assert found["Au"] == pytest.approx(-2.5)


@pytest.mark.parametrize(("steps", "said"), [(2, 1), (3, 2), (3, 1)])
def test_a_module_that_claims_too_few_layers_is_refused(steps: int, said: int, tmp_path: Path) -> None:
    """LAMMPS would leave out atoms that its energies depend on. A chain, so that distances are numbers of edges."""
    chain = Atoms("Cu8", positions=[[2.5 * k, 0.1 * (k % 3), 0.0] for k in range(8)])
    structures = []
    for seed in range(3):
        atoms = chain.copy()
        atoms.rattle(0.05, seed=seed)
        atoms.calc = SinglePointCalculator(atoms, energy=0.1 * seed, forces=np.zeros((8, 3)))
        structures.append(atoms)
    write_structures(tmp_path / "data.extxyz", structures)
    arguments = tmp_path / "data.extxyz", "--out", tmp_path / "model.pt"
    ubmd_wrap(layered(tmp_path / "right.pt", steps, steps), *arguments)
    wrong = layered(tmp_path / "wrong.pt", steps, said)
    done = CliRunner().invoke(app, ["wrap", *map(str, (wrong, *arguments))])
    assert done.exit_code == 1
    assert f"passes messages in more steps than layers = {said} says" in done.output


def test_the_example_of_the_manual_runs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = USAGE.read_text().partition("## Your own model")[2]
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(example.group(1))
    runpy.run_path("example.py", run_name="example")  # TorchScript reads its source
    ubmd_wrap("module.pt", data, "--out", "model.pt")
    assert ubmd.Calculator("model.pt").get_forces(labelled(40)).shape == (4, 3)


class Wrong(torch.nn.Module):
    """A module with a mistake in what it says of itself."""

    def __init__(self, **said: object) -> None:
        super().__init__()
        for name, value in {"elements": ["Cu"], "cutoff": 3.0, "layers": 1, **said}.items():
            if value is not None:
                setattr(self, name, value)

    def forward(
        self, species: torch.Tensor, edge_index: torch.Tensor, edge_vector: torch.Tensor, n_local: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.zeros(n_local, 3, dtype=torch.float64).index_add(0, edge_index[0], edge_vector.double())
        return sums.square().sum(1), sums


class Other(torch.nn.Module):
    """A module of another interface."""

    def forward(self, data: dict[str, torch.Tensor]) -> torch.Tensor:
        return data["positions"].sum()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"layers": None}, "has no attribute 'layers'"),
        ({"elements": ["Cu", "Gd", "Xy"]}, "names Xy, which is no element"),
        ({"elements": ["Cu", "Cu"]}, "names an element twice"),
        ({"cutoff": -1.0}, "cutoff = -1.0 is no length in Å"),
        ({"layers": 0}, "layers = 0 is no number of message-passing steps"),
        ({"precision": "half"}, "precision = 'half' is neither 'float32' nor 'float64'"),
    ],
)
def test_what_a_module_says_wrongly_is_one_sentence(said: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(words)):
        read_raw(save(Wrong(**said), tmp_path / "module.pt"))


def test_other_files_are_told_apart(data: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.model")
    assert not is_torchscript(tmp_path / "weights.model")
    with pytest.raises(ModelError, match="is no TorchScript file"):
        read_raw(tmp_path / "weights.model")
    with pytest.raises(
        ModelError, match=re.escape("forward takes (data), but (species, edge_index, edge_vector, n_lo")
    ):
        read_raw(save(Other(), tmp_path / "other.pt"))
    with pytest.raises(ModelError, match="There is no file"):
        read_raw(tmp_path / "missing.pt")
    done = CliRunner().invoke(app, ["wrap", str(tmp_path / "weights.model"), str(data)])
    assert done.exit_code == 1
    assert "name a Python that has the package mace: --python" in done.output
    ubmd_wrap(layered(tmp_path / "module.pt"), data, "--out", tmp_path / "model.pt")
    done = CliRunner().invoke(app, ["wrap", str(tmp_path / "module.pt"), str(data), "--features", "node"])
    assert "--features: there is no 'node'; did you mean 'nodes'?" in done.output
    done = CliRunner().invoke(app, ["wrap", str(tmp_path / "module.pt"), str(data), "--set", "kind=ensemble"])
    assert "networks of other programs have kind=posterior or kind=distance" in done.output
    with pytest.raises(ModelError, match="is a model file of ubmd already"):
        read_raw(tmp_path / "model.pt")


def test_kind_file_trains_constants_only(data: Path, tmp_path: Path) -> None:
    layered(tmp_path / "module.pt")
    files = {}
    for mode in ("refit", "none"):
        values = {
            "training_file": "data.extxyz",
            "output_dir": str(tmp_path / mode),
            "model": {"kind": "file", "checkpoint": "module.pt"},
            "training": {"mode": mode},
        }
        (tmp_path / "train.toml").write_text(tomli_w.dumps(values))
        done = CliRunner().invoke(app, ["train", str(tmp_path / "train.toml")])
        assert done.exit_code == 0, done.output
        files[mode] = ubmd.Calculator(tmp_path / mode / "model.pt", precision="double")
    atoms = labelled(50)
    np.testing.assert_allclose(files["refit"].get_forces(atoms), files["none"].get_forces(atoms), atol=1e-12)
    error = {mode: abs(each.get_potential_energy(atoms) - atoms.get_potential_energy()) for mode, each in files.items()}
    assert error["refit"] < error["none"]
    model = ModelSettings(kind="file", checkpoint=Path("module.pt"))
    assert list(backend_files(model, tmp_path)) == ["module.pt"]


@pytest.mark.parametrize(
    ("model", "training", "words"),
    [
        ({"checkpoint": "a.pt"}, {}, "model.checkpoint belongs to model.kind = 'file' or 'mace', not to 'gmnn'"),
        (
            {"kind": "file", "checkpoint": "a.pt", "features": "readout"},
            {},
            "model.features belongs to model.kind = 'mace'",
        ),
        ({"kind": "mace", "hidden": [8, 8]}, {}, "model.hidden belongs to model.kind = 'gmnn'"),
        ({}, {"mode": "none"}, "training.mode is for model.kind = 'mace' or 'file', not for 'gmnn'"),
        (
            {"kind": "file", "checkpoint": "a.pt"},
            {"mode": "fine-tune"},
            "is not for model.kind = 'file', whose weights stay",
        ),
        ({"kind": "file", "checkpoint": "a.pt"}, {"epochs": 5}, "training.epochs has no effect on model.kind = 'file'"),
        ({"kind": "mace"}, {"learning_rate": 0.1}, "remove it; what mace_run_train takes goes into [model.arguments]"),
        ({"kind": "mace"}, {"mode": "refit"}, "training.mode = 'refit' needs model.checkpoint"),
        ({"kind": "mace", "chekpoint": "a"}, {}, "unknown key 'model.chekpoint'; did you mean 'checkpoint'?"),
    ],
)
def test_keys_that_do_not_fit_the_kind(model: dict, training: dict, words: str) -> None:
    values = {"training_file": "a.xyz", "output_dir": "b", "model": model, "training": training}
    with pytest.raises(SettingsError, match=re.escape(words)):
        make_settings(TrainSettings, values)


def test_what_kind_file_needs(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"needs model\.checkpoint"):
        backend_of(ModelSettings(kind="file"), tmp_path)
    with pytest.raises(SettingsError, match=r"model\.checkpoint: there is no file"):
        backend_of(ModelSettings(kind="file", checkpoint=Path("a.pt")), tmp_path)
