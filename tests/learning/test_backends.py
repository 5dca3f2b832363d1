"""What every back end passes: train, calibrate, export, LAMMPS with a bias, both schedules, in spawned workers.

The stranger is `tests/helpers/linear_backend.py`, named by import path; a copy lies beside the settings file.
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import ase.io
import message_passing
import numpy as np
import pytest
import tomli_w
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from processes import HELPERS
from said import by_lammps
from system import cluster, make_settings
from typer.testing import CliRunner

import ubmd
from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import ModelError, SettingsError
from ubmd.files import file_hash
from ubmd.learning import RunFolder, check, run
from ubmd.learning.dynamic.engine import run as run_dynamic
from ubmd.potentials.fitting import export_raw
from ubmd.potentials.interface import RawModule
from ubmd.potentials.record import read_record
from ubmd.settings import ModelSettings, UncertaintySettings, load_settings
from ubmd.settings.dynamic import DynamicRunSettings

HELPER = HELPERS / "linear_backend.py"
STRANGER = {"kind": "stranger:Linear", "arguments": {"functions": 5}}
GMNN = {"hidden": [16, 16], "n_radial": 2, "cutoff": 4.0}
BASELINE = {"baseline": "zbl", "atom_energies": {"Cu": 3.51, "Au": 3.8}}
MESSAGES = {"kind": "message_passing:MessagePassing"}
BACKENDS = {"linear": STRANGER, "gmnn": GMNN, "linear sum": STRANGER | BASELINE, "gmnn sum": GMNN | BASELINE}
BACKENDS |= {"messages": MESSAGES, "messages sum": MESSAGES | BASELINE}


def labelled(seed: int) -> Atoms:
    """A shaken cell of copper and gold with EMT labels."""
    atoms = bulk("Cu", cubic=True).repeat((2, 2, 2))
    atoms.symbols[::5] = "Au"
    atoms.rattle(0.12, seed=seed)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


@pytest.fixture(scope="module", params=BACKENDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model file, trained by `ubmd train`."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    is_gmnn = request.param.startswith("gmnn")
    shutil.copy(HELPER, folder / "stranger.py")
    write_structures(folder / "train.extxyz", [labelled(seed) for seed in range(10)])
    settings = {
        "training_file": "train.extxyz",
        "output_dir": str(folder),
        "validation_share": 0.3,
        "model": BACKENDS[request.param],
        "training": {"epochs": 60, "threads": 1},
        "uncertainty": {"projections": 16},
    }
    (folder / "train.toml").write_text(tomli_w.dumps(settings))
    for _ in range(2):  # the second time it is finished, and only looked up by those who can
        done = CliRunner().invoke(app, ["train", str(folder / "train.toml")])
        assert done.exit_code == 0, done.output
        assert ("kept: epoch " in done.output) == is_gmnn
        assert ("log and picture: " in done.output) == (folder / "log.csv").exists() == is_gmnn
    return folder


def test_the_record_names_the_back_end_and_what_was_calibrated(trained: Path) -> None:
    record = read_record(trained / "model.pt")
    assert record is not None
    name = next((name for name in ("linear", "messages") if (trained / f"{name}.pt").exists()), "gmnn")
    assert record["model"] == name
    assert (record["format"], len(record["atom_scale"])) == (4, 2)
    assert record.get("layers", 1) == (3 if name == "messages" else 1)
    assert record["elements"] == ["Cu", "Au"] if record["model"] == "gmnn" else ["Au", "Cu"]
    assert record["uncertainty"]["forces"]["scale"] > 0.0
    assert record["n_training"] == 7
    model = record["settings"]["model"]
    assert ("baseline" in record) == (model["baseline"] == "zbl")
    if "baseline" in record:
        assert record["baseline"]["covalent_radii"] == {"Cu": 1.32, "Au": 1.36}
        assert record["baseline"]["atom_energies"] == model["atom_energies"]


def test_its_errors_are_small(trained: Path) -> None:
    """With a baseline, too, whose forces alone are as large as those of the labels."""
    atoms = labelled(30)
    forces = ubmd.Calculator(trained / "model.pt").get_forces(atoms)
    difference = np.linalg.norm(forces - atoms.get_forces()) / np.linalg.norm(atoms.get_forces())
    assert difference < 0.5


def test_forces_stress_and_gradients_of_the_uncertainty_are_derivatives(trained: Path) -> None:
    calculator = ubmd.Calculator(trained / "model.pt", precision="double")
    atoms = labelled(20)
    atoms.calc = calculator
    forces, bias = atoms.get_forces().copy(), calculator.get_bias_forces(atoms).copy()
    sizes = []
    for sign in (1.0, -1.0):
        moved = atoms.copy()
        moved.positions[3, 1] += sign * 1e-4
        moved.calc = calculator
        sizes.append((moved.get_potential_energy(), calculator.results["uncertainty"]))
    slopes = (np.array(sizes[0]) - sizes[1]) / 2e-4
    assert forces[3, 1] == pytest.approx(-slopes[0], rel=1e-5, abs=1e-6)
    assert bias[3, 1] == pytest.approx(slopes[1], rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("precision", ["mixed", "single"])
def test_other_precisions_run_and_say_nearly_the_same(precision: str, trained: Path) -> None:
    """Unless the module runs in one only, which is said."""
    if (trained / "messages.pt").exists():
        with pytest.raises(ModelError, match=rf"runs in double precision only, not in {precision}: leave"):
            ubmd.Calculator(trained / "model.pt", precision=precision)
        return
    found = []
    for chosen in ("double", precision):
        atoms = labelled(22)
        atoms.calc = ubmd.Calculator(trained / "model.pt", precision=chosen)
        found.append(np.append(atoms.get_forces(), atoms.calc.results["uncertainty"]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_lammps_says_the_same_with_a_bias(trained: Path, tmp_path: Path) -> None:
    atoms = labelled(21)
    calculator = ubmd.Calculator(trained / "model.pt", precision="double")
    atoms.calc = calculator
    ase.io.write(tmp_path / "bulk.data", atoms, format="lammps-data", specorder=["Cu", "Au"], masses=True)
    said = by_lammps(trained / "model.pt", tmp_path / "bulk.data", "Cu Au", "force 0.5", tmp_path)
    assert said["pe"] == pytest.approx(atoms.get_potential_energy(), rel=1e-12)
    columns = np.array([said[f"atoms f_b[{k}]"] for k in (2, 3, 4)]).T
    gradient = calculator.get_bias_forces(atoms)
    factor = (columns * gradient).sum() / (gradient * gradient).sum()
    assert factor != 0.0
    np.testing.assert_allclose(columns, factor * gradient, atol=1e-8 * np.abs(columns).max())
    total = np.array([said[f"atoms f{axis}"] for axis in "xyz"]).T
    np.testing.assert_allclose(total - columns, atoms.get_forces(), atol=1e-8)


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["alone", "sum"])
def test_it_goes_through_the_loop_in_spawned_workers(baseline: dict, tmp_path: Path) -> None:
    name = "my_sum" if baseline else "my_network"  # this process keeps what it has imported
    module = tmp_path / f"{name}.py"
    shutil.copy(HELPER, module)
    write_structures(tmp_path / "start.extxyz", [cluster()])
    settings = make_settings(tmp_path / "run", test=None)
    network = ModelSettings.model_validate(STRANGER | baseline | {"kind": f"{name}:Linear"})
    settings = settings.model_copy(update={"model": network})
    folder = RunFolder(run(settings, tmp_path))
    dataset, history = read_structures(folder.dataset), folder.read_history()
    assert len(dataset) == 8
    assert history[-1]["ended"]["rule"] == "labels"
    assert any(replica["bias_share"] > 0.0 for entry in history for replica in entry["replicas"])
    record = read_record(folder.model)
    assert record is not None
    assert record["model"] == "linear"
    assert ("baseline" in record) == bool(baseline)
    assert all(entry["train"]["force_rmse"] < 0.3 for entry in history)
    before = folder.dataset.read_bytes()
    shutil.rmtree(folder.iteration(1))  # what is missing is made again, the same
    run(settings, tmp_path)
    assert folder.dataset.read_bytes() == before
    assert folder.read_manifest()["backend"] == {"files": {module.name: file_hash(module)}}
    before_edit = remarks(folder)
    assert not any(module.name in text for text in before_edit)
    module.write_text(module.read_text() + "# edited\n")
    run(settings, tmp_path)
    assert folder.dataset.read_bytes() == before
    assert remarks(folder) == [
        *before_edit,
        f"{module.name} (model.kind) has changed since the run was started; what the run has made with it stays.",
    ]


def test_a_run_of_any_back_end_can_be_checked(tmp_path: Path) -> None:
    shutil.copy(HELPER, tmp_path / "checked.py")
    write_structures(tmp_path / "start.extxyz", [cluster()])
    settings = make_settings(tmp_path / "run", test=None)
    network = ModelSettings.model_validate(STRANGER | {"kind": "checked:Linear"})
    said = list(check(settings.model_copy(update={"model": network}), tmp_path))
    assert any("training not known (this kind of network keeps no times of epochs)" in line for line in said)
    assert any(line.startswith("Rough disk space") for line in said)


def remarks(folder: RunFolder) -> list[str]:
    """What a run has said that is no mistake."""
    events = map(json.loads, folder.events.read_text().splitlines())
    return [event["text"] for event in events if event["event"] == "remark"]


@pytest.mark.slow
def test_message_passing_goes_through_the_loop_on_two_ranks(tmp_path: Path) -> None:
    """With md.precision as it is by default, which this module has not."""
    write_structures(tmp_path / "start.extxyz", [cluster()])
    settings = make_settings(tmp_path / "run", test=None, md={"ranks": 2})
    settings = settings.model_copy(update={"model": ModelSettings.model_validate(MESSAGES)})
    assert settings.md.precision == "mixed"
    folder = RunFolder(run(settings, tmp_path))
    assert len(read_structures(folder.dataset)) == 8
    assert any(replica["bias_share"] > 0.0 for entry in folder.read_history() for replica in entry["replicas"])


@pytest.mark.parametrize("baseline", [{}, BASELINE], ids=["alone", "sum"])
def test_a_network_of_any_back_end_learns_along_trajectories(baseline: dict, tmp_path: Path) -> None:
    shutil.copy(HELPER, tmp_path / "stranger.py")
    write_structures(tmp_path / "box.extxyz", [bulk("Cu", cubic=True)])
    values = {
        "run_dir": str(tmp_path / "run"),
        "model": STRANGER | baseline,
        "training": {"epochs": 5, "threads": 1},
        "start": {"file": "box.extxyz", "count": 3, "displacement": 0.05},
        "reference": {"calculator": "ase.calculators.emt:EMT"},
        "dynamic": {
            "temperatures": [600.0],
            "steps": 40,
            "timestep": 2.0,
            "check_every": 4,
            "segment": 20,
            "labels": 5,
            "trigger": {"rule": "absolute", "threshold": 1e-4},
        },
        "workers": {"processes": 1},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(values))
    folder = RunFolder(run_dynamic(load_settings(tmp_path / "run.toml", DynamicRunSettings), tmp_path))
    assert len(read_structures(folder.dataset)) == 5
    record = read_record(folder.model)
    assert record is not None
    assert record["model"] == "linear"
    assert ("baseline" in record) == bool(baseline)
    assert folder.read_history()[-1]["train"]["relative"] < 0.05


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        (
            {"model": {"kind": "mece"}},
            r"kind = 'mece' is neither the name of an installed back end \(file, gmnn, mace\).*; did you mean 'mace'\?",
        ),
        (
            {"model": {"kind": "nowhere:Linear"}},
            r"kind = 'nowhere:Linear' cannot be imported: there is no nowhere",
        ),
        ({"model": {"kind": "stranger:Linaer"}}, r"model.kind: the module stranger has no 'Linaer'"),
        ({"model": {"kind": "stranger:Module"}}, r"model.kind = 'stranger:Module' could not be created"),
        ({"model": {"kind": "stranger:CUTOFF"}}, r"is not a back end: it has no 'name'"),
        (
            {"model": STRANGER, "uncertainty": {"kind": "ensemble"}, "selection": {"method": "max_diag"}},
            r"does not support uncertainty.kind = 'ensemble', only post",
        ),
    ],
)
def test_what_is_no_back_end_is_said_before_anything_runs(tables: dict, words: str, tmp_path: Path) -> None:
    shutil.copy(HELPER, tmp_path / "stranger.py")
    write_structures(tmp_path / "start.extxyz", [cluster()])
    settings = make_settings(tmp_path / "run", **{k: v for k, v in tables.items() if k != "model"})
    settings = settings.model_copy(update={"model": ModelSettings.model_validate(tables["model"])})
    with pytest.raises(SettingsError, match=words):
        list(check(settings, tmp_path))
    assert not (tmp_path / "run").exists()


class Broken(torch.nn.Module):
    """A module that gives what is asked for wrongly."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(
        self, species: torch.Tensor, edge_index: torch.Tensor, edge_vector: torch.Tensor, n_local: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.zeros(n_local, 3, dtype=torch.float64).index_add(0, edge_index[0], edge_vector.double())
        energy = sums.square().sum(1)
        if self.fault == "shape":
            energy = energy.sum().unsqueeze(0)
        if self.fault == "dtype":
            energy = energy.float()
        if self.fault == "constant":
            energy = torch.zeros(n_local, dtype=torch.float64)
        if self.fault == "nan":
            energy = energy / 0.0 * 0.0
        return energy, sums


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("shape", r"energies of shape \(1,\), not one for each of 32 atoms"),
        ("dtype", r"energies in torch.float32, not float64"),
        ("features", r"features of shape \(32, 3\), not \(32, 4\)"),
        ("constant", r"that do not depend on edge_vector"),
        ("nan", r"that are not finite"),
        ("", r""),
    ],
)
def test_a_module_that_does_not_give_what_it_should(fault: str, words: str, tmp_path: Path) -> None:
    torch.jit.script(Broken(fault)).save(str(tmp_path / "raw.pt"))
    raw = RawModule(tmp_path / "raw.pt", ["Cu", "Au"], 4.0, 4 if fault == "features" else 3)
    structures = [labelled(seed) for seed in range(3)]
    refused = pytest.raises(ModelError, match=f"The module of the back end 'broken' gives .*{words}")
    with refused if fault else nullcontext():
        export_raw(
            raw, "broken", ModelSettings(), structures[:2], structures[2:], UncertaintySettings(), tmp_path / "model.pt"
        )
    assert (tmp_path / "model.pt").exists() != bool(fault)


@pytest.mark.parametrize("stated", [1, 2, 3])
def test_a_module_that_passes_messages_further_than_it_says(stated: int, tmp_path: Path) -> None:
    """It would be wrong in LAMMPS without a message."""
    refused = pytest.raises(ModelError, match=rf"passes messages in more steps than layers = {stated} says")
    with refused if stated < message_passing.LAYERS else nullcontext():
        structures = [labelled(seed) for seed in range(4)]
        message_passing.export(tmp_path / "model.pt", ["Cu", "Au"], structures, stated=stated)
    assert (tmp_path / "model.pt").exists() == (stated == message_passing.LAYERS)


def test_keys_of_one_back_end_are_not_those_of_another() -> None:
    with pytest.raises(ValueError, match=r"model.hidden belongs to model.kind = 'gmnn'"):
        ModelSettings.model_validate(STRANGER | {"hidden": [8, 8]})
    with pytest.raises(ValueError, match=r"model.arguments are for back ends other than"):
        ModelSettings.model_validate({"arguments": {"a": 1}})
