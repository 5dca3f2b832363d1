"""Devices: their names and refusals, and the chain from training to evaluation on another device than the CPU.

No GPU is needed: `elsewhere` is a device with real numbers that has none of the compiled kernels, on which mixed
devices are errors. What is computed there is plain torch, and has to be what the compiled operators compute on the CPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import fcc111, molecule
from ase.constraints import FixAtoms
from elsewhere import NAME, MixedDevices, elsewhere, put
from small_model import ELEMENTS, SETTINGS, labelled, triclinic, with_emt_labels

import ubmd
from ubmd import devices
from ubmd.data import graph as graphs
from ubmd.data.extxyz import write_structures
from ubmd.data.graph import build_graph, collate
from ubmd.errors import SettingsError
from ubmd.lammps.box import Box
from ubmd.lammps.session import system_commands
from ubmd.learning.loop.replicas import replica_tasks, settled
from ubmd.learning.loop.verify import verify
from ubmd.operators import use_operators
from ubmd.potentials import fitting
from ubmd.potentials.evaluator import NetworkEvaluator
from ubmd.potentials.file import load_with_record
from ubmd.potentials.gmnn import checkpoint
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.gradient import loss_and_gradients, prediction_errors
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.gmnn.trainer import train
from ubmd.potentials.interface import Prediction
from ubmd.potentials.mace.arguments import check_arguments, device_argument
from ubmd.settings import (
    MDSettings,
    ModelSettings,
    RunSettings,
    TrainingSettings,
    UncertaintySettings,
    make_settings,
)
from ubmd.settings.dynamic import DynamicRunSettings

KINDS = ("posterior", "last-layer", "distance", "ensemble")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(autouse=True)
def no_optimiser() -> Iterator[None]:
    """As everywhere in this package."""
    with torch.jit.optimized_execution(False):
        yield


def slab(seed: int) -> Atoms:
    """A slab with a fixed layer, whose stress has no components along its normal."""
    atoms = fcc111("Al", (1, 2, 2), vacuum=5.0)
    atoms.pbc = (True, True, False)
    atoms.rattle(0.05, seed=seed)
    atoms.set_constraint(FixAtoms([0, 1]))
    with_emt_labels(atoms)
    atoms.calc.results["stress"] = np.random.default_rng(seed).normal(0.0, 0.01, 6)
    return atoms


def molecules(first: int, last: int) -> list[Atoms]:
    return [labelled(molecule("CH3CONH2"), k) for k in range(first, last)]


def options(device: str = "cpu", **changes: object) -> TrainingSettings:
    """Of a training in float64; a device that settings would refuse is allowed."""
    usual = {"epochs": 3, "batch_size": 3, "threads": 1, "precision": "float64", "fixed_forces": False}
    return TrainingSettings(**{**usual, **changes}).model_copy(update={"device": device})


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12"])
def test_names(name: str) -> None:
    assert TrainingSettings(device=name).device == MDSettings(device=name).device == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpu", "did you mean 'cuda'"),
        ("cudda", "did you mean 'cuda'"),
        ("CPU", "did you mean 'cpu'"),
        ("cuda:x", "n, from"),
    ],
)
def test_names_that_are_none(name: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=rf"'device': a device is cpu, cuda .* or cuda:n .*{hint}.*got '{name}'"):
        make_settings(TrainingSettings, {"device": name})
    with pytest.raises(SettingsError, match=rf"'device': a device is cpu, .*got '{name}'"):
        ubmd.Model("model.pt", device=name)


def test_force_constants_have_no_other_device() -> None:
    values: dict[str, Any] = {
        "run_dir": "run",
        "crystal": {"structure": "a.xyz", "cutoffs": {"2": 3.0}},
        "reference": {"calculator": "emt"},
        "dynamic": {"device": "cuda"},
    }
    with pytest.raises(SettingsError, match=r"dynamic.device = 'cuda' is for networks; force constants run on the CPU"):
        make_settings(DynamicRunSettings, values)


@NO_GPU
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Said before anything is trained."""
    with pytest.raises(SettingsError, match=r"training.device = 'cuda' cannot be used: torch .*: use 'cpu', or"):
        train(SETTINGS, options("cuda"), molecules(0, 3), molecules(3, 4), tmp_path / "out", 0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match="device = 'cuda:1' cannot be used"):
        ubmd.Model(tmp_path / "model.pt", device="cuda:1")
    with pytest.raises(SettingsError, match="device = 'cuda' cannot be used"):
        ubmd.evaluate(tmp_path / "model.pt", molecules(0, 1), device="cuda")
    assert devices.usable("cuda") == "cpu"


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said where torch has CUDA: without a GPU, and of a number that is too high."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.what_is_missing("cuda").startswith("torch finds no GPU: use 'cpu'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.what_is_missing("cuda:1") == devices.what_is_missing("cuda") == ""
    assert devices.what_is_missing("cuda:2") == "the last GPU is cuda:1: use 'cuda' for the first one"


# ----------------------------------------------------------------------------------------- the device of the tests


def test_the_device_computes() -> None:
    with elsewhere() as device:
        x = torch.linspace(0.0, 1.0, 3).to(device).requires_grad_(True)
        (slope,) = torch.autograd.grad((x.square() * x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
        assert (second.device.type, second.is_cpu) == (NAME, False)
        np.testing.assert_allclose(second.cpu().numpy(), [0.0, 3.0, 6.0])
        with pytest.raises(RuntimeError, match="numpy"):
            second.numpy()


MIXED = {
    "a sum": lambda x: x + torch.zeros(3),
    "an index of index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "a sum by index": lambda x: torch.zeros(3).index_add(0, torch.arange(3).to(x.device), x),
    "two parts": lambda x: torch.cat([x, torch.ones(2)]),
}


@pytest.mark.parametrize("what", MIXED)
def test_mixed_devices_are_found(what: str) -> None:
    with pytest.raises(MixedDevices, match="are on the CPU, others are not"), elsewhere() as device:
        MIXED[what](torch.ones(3).to(device))


@pytest.mark.parametrize("place", [(graphs, "_moved"), (fitting, "structure_means")], ids=["batch", "means"])
def test_a_planted_fault_is_found(place: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that stays on the CPU, in the calibration of a model."""
    module, name = place
    right = getattr(module, name)
    wrong = {
        "_moved": lambda part, device: replace(right(part, device), species=part.species),
        "structure_means": lambda phi, batch: right(phi, batch).cpu(),
    }
    monkeypatch.setattr(module, name, wrong[name])
    network = GaussianMomentNetwork(ELEMENTS, SETTINGS)
    settings = UncertaintySettings(projections=8, alpha=0.3)
    with pytest.raises(MixedDevices), elsewhere():
        export_model(network, molecules(0, 3), molecules(3, 6), settings, tmp_path / "model.pt", device=NAME)


# ------------------------------------------------------------------------------------------------------ training


CASES = {
    "molecules": (SETTINGS, molecules(0, 4)),
    "cells": (SETTINGS, [labelled(triclinic(), k) for k in range(3)]),
    "slabs": (ModelSettings(cutoff=4.0, n_radial=3, n_basis=4, hidden=(16, 12)), [slab(k) for k in range(3)]),
    "given energies of atoms": (
        SETTINGS.model_copy(update={"atom_energies": dict.fromkeys(ELEMENTS, -1.0)}),
        molecules(0, 3),
    ),
}


def elements_of(structures: list[Atoms]) -> list[str]:
    return sorted({symbol for atoms in structures for symbol in atoms.symbols})


def parts_of(errors: Any) -> dict[str, np.ndarray]:
    return {field.name: getattr(errors, field.name).detach().cpu().numpy() for field in fields(errors)}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str) -> None:
    """By the operators, by plain torch, and on another device."""
    settings, structures = CASES[case]
    chosen, elements = options(), elements_of(structures)
    batch = collate([build_graph(atoms, elements, settings.cutoff) for atoms in structures])
    found = []
    with elsewhere() as device:
        for place, operators in ((torch.device("cpu"), True), (torch.device("cpu"), False), (device, True)):
            model = GaussianMomentNetwork(elements, settings, seed=2).to_network_dtype(torch.float64)
            use_operators(model, operators)
            model.to(place)
            errors, value = loss_and_gradients(model, batch.to(place), chosen)
            checked = parts_of(prediction_errors(model, batch.to(place)))
            gradients = {name: p.grad.cpu().numpy() for name, p in model.named_parameters()}
            found.append((value, parts_of(errors), checked, gradients))
    for value, *parts in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-10)
        for one, other in zip(parts, found[0][1:], strict=True):
            for name, expected in other.items():
                scale = max(1.0, float(np.abs(expected).max())) if expected.size else 1.0
                np.testing.assert_allclose(one[name], expected, rtol=1e-10, atol=1e-10 * scale, err_msg=name)


def trained(folder: Path, device: str, **changes: object) -> GaussianMomentNetwork:
    sets = molecules(0, 6), molecules(6, 8)
    return train(SETTINGS, options(device, **changes), *sets, folder, seed=1).model


@pytest.fixture
def devices_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings of these tests ask for a device that no settings file can name."""
    monkeypatch.setattr(devices, "spelled", lambda device: device)
    monkeypatch.setattr(devices, "what_is_missing", lambda device: "")


@pytest.mark.usefixtures("devices_may_be_anything")
def test_a_training_on_another_device(tmp_path: Path) -> None:
    here = trained(tmp_path / "here", "cpu")
    with elsewhere():
        there = trained(tmp_path / "there", NAME)
    assert there.radial.is_cpu
    for name, tensor in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name], tensor, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(checkpoint.load_weights(tmp_path / "there" / "weights.pt").radial, there.radial)


@pytest.mark.usefixtures("devices_may_be_anything")
@pytest.mark.parametrize("first", ["cpu", NAME])
def test_a_training_that_changes_its_device(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after two of three epochs, it continues on the other device; its files are of the CPU."""
    second, seen = (NAME, "cpu")[first != "cpu"], []

    def interrupt(row: dict[str, Any]) -> None:
        seen.append(row["epoch"])
        if len(seen) == 3:
            raise KeyboardInterrupt

    sets = molecules(0, 6), molecules(6, 8)
    expected = trained(tmp_path / "whole", "cpu")
    with elsewhere():
        with pytest.raises(KeyboardInterrupt):
            train(SETTINGS, options(first, checkpoint_every=2), *sets, tmp_path / "a", seed=1, progress=interrupt)
        state = checkpoint.load(tmp_path / "a" / "checkpoint.pt", "checkpoint")
        assert (state["epoch"], state["model"]["network.weight1"].device.type) == (2, "cpu")
        found = train(
            SETTINGS, options(second), *sets, tmp_path / "a", seed=1, progress=lambda row: seen.append(row["epoch"])
        )
    assert seen == [1, 2, 3, 3]
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------- uncertainties, calibration, evaluation


def networks(count: int) -> list[GaussianMomentNetwork]:
    found = [GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=k) for k in range(count)]
    for model in found:
        model.initialise_energies([build_graph(atoms, ELEMENTS, SETTINGS.cutoff) for atoms in molecules(0, 3)])
    return found


def settings_of(kind: str) -> UncertaintySettings:
    return UncertaintySettings(kind=kind, projections=8, references=12, alpha=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_calibrated_on_another_device(kind: str, tmp_path: Path) -> None:
    """The file is that of the CPU, up to rounding, and the networks stay where they were."""
    settings, paths = settings_of(kind), [tmp_path / "here.pt", tmp_path / "there.pt"]
    models = networks(settings.networks)
    with elsewhere():
        for path, device in zip(paths, ("cpu", NAME), strict=True):
            export_model(models, molecules(0, 5), molecules(5, 9), settings, path, device=device)
            assert all(parameter.is_cpu for model in models for parameter in model.parameters())
    atoms = [*molecules(20, 22), triclinic()]
    here, there = (ubmd.Model(path, "double") for path in paths)
    for one, other in zip(there.predict(atoms), here.predict(atoms), strict=True):
        assert_same(one, other)


def assert_same(one: Prediction, other: Prediction, tolerance: float = 1e-10) -> None:
    """All that a prediction holds, but for rotations of the features."""
    for name in ("energy", "forces", "stress", "u", "atomic_u"):
        found, expected = getattr(one, name), getattr(other, name)
        if expected is None:
            assert found is None
        else:
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=name)


def moved(path: Path, precision: str) -> NetworkEvaluator:
    """The evaluator of a model file on the other device. A GPU gets the file from torch.jit.load at once."""
    module, record = load_with_record(path, precision)
    return NetworkEvaluator(put(module), record, precision, NAME)


BASELINES = {"no baseline": {}, "baseline": {"baseline": "zbl", "atom_energies": dict.fromkeys(ELEMENTS, -1.0)}}


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_on_another_device(kind: str, baseline: str, operators: bool, tmp_path: Path) -> None:
    """Energies, forces, stresses, uncertainties and the gradients of both, of a file with operators or without."""
    settings, changes = settings_of(kind), BASELINES[baseline]
    models = [GaussianMomentNetwork(ELEMENTS, SETTINGS.model_copy(update=changes), k) for k in range(settings.networks)]
    path = tmp_path / "model.pt"
    export_model(models, molecules(0, 5), molecules(5, 9), settings, path, operators=operators)
    atoms = [*molecules(20, 22), triclinic(), Atoms("CH", [[0, 0, 0], [9, 0, 0]])]
    here = ubmd.Model(path, "double")._kind
    with elsewhere():
        there = moved(path, "double")
        for one, other in zip(there.predict(atoms), here.predict(atoms), strict=True):
            assert_same(one, other)
        for method in ("uncertainty_gradient", "atomic_uncertainty_gradient"):
            for structure in atoms[1:]:
                for found, expected in zip(
                    getattr(there, method)(structure), getattr(here, method)(structure), strict=True
                ):
                    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10, err_msg=method)
        prediction, gradient, _ = there.predict_with_gradient(atoms[0])
        assert_same(prediction, here.predict(atoms[:1])[0])
        np.testing.assert_allclose(gradient, here.uncertainty_gradient(atoms[0])[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("precision", ["mixed", "single"])
def test_evaluation_in_float32(precision: str, tmp_path: Path) -> None:
    export_model(networks(1), molecules(0, 5), molecules(5, 9), settings_of("posterior"), tmp_path / "model.pt")
    atoms = molecules(20, 22)
    here = ubmd.Model(tmp_path / "model.pt", precision)._kind
    with elsewhere():
        there = moved(tmp_path / "model.pt", precision)
        for one, other in zip(there.predict(atoms), here.predict(atoms), strict=True):
            assert_same(one, other, 2e-4)


def test_a_pickle_keeps_the_device(tmp_path: Path) -> None:
    export_model(networks(1), molecules(0, 5), molecules(5, 9), settings_of("posterior"), tmp_path / "model.pt")
    model = ubmd.Model(tmp_path / "model.pt")
    state = model.__getstate__()
    assert state["device"] == pickle.loads(pickle.dumps(model))._device == "cpu"
    again = ubmd.Model.__new__(ubmd.Model)
    again.__setstate__({key: value for key, value in state.items() if key != "device"})  # of an earlier version
    assert again._device == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="device = 'cuda' cannot be used"):
            again.__setstate__({**state, "device": "cuda"})


# ------------------------------------------------------------------------------------------------------------- MD


def run_settings(**tables: Any) -> RunSettings:
    values = {"run_dir": "run", "start": {"file": "start.xyz"}, "reference": {"calculator": "emt"}}
    return make_settings(RunSettings, {**values, **tables})


def test_the_device_of_replicas() -> None:
    """It is in their tasks, but not in the keys of their results."""
    one, other = (run_settings(md={"replicas": 1, "device": device}) for device in ("cpu", "cuda:1"))
    tasks = [replica_tasks(settings, 0, Path("model.pt"), [Path("start.xyz")])[0] for settings in (one, other)]
    assert [task.device for task in tasks] == ["cpu", "cuda:1"]
    assert settled(tasks[0]) == settled(tasks[1])


def test_the_device_in_the_input_of_lammps(tmp_path: Path) -> None:
    export_model(networks(1), molecules(0, 5), molecules(5, 9), settings_of("posterior"), tmp_path / "model.pt")
    atoms, model = triclinic(), tmp_path / "model.pt"
    styles = [
        next(line for line in system_commands(atoms, Box(atoms), model, "mixed", device=name) if "pair_style" in line)
        for name in ("cpu", "cuda", "cuda:1")
    ]
    plain = "pair_style ubmd precision mixed"
    assert styles == [plain, f"{plain} device cuda", f"{plain} device cuda:1"]


@NO_GPU
def test_a_run_without_its_gpu(tmp_path: Path) -> None:
    """Both keys are looked at before anything is labelled; MD of other machines is not."""
    write_structures(tmp_path / "start.xyz", molecules(0, 1))
    for tables, key in (({"training": {"device": "cuda"}}, "training"), ({"md": {"device": "cuda:1"}}, "md")):
        with pytest.raises(SettingsError, match=rf"{key}\.device = 'cuda.*' cannot be used: torch .*: use 'cpu'"):
            verify(run_settings(**tables), tmp_path)
    verify(run_settings(md={"device": "cuda"}), tmp_path, here=False)
    verify(run_settings(md={"device": "cuda"}, workers={"executor": "parsl"}), tmp_path)


# ----------------------------------------------------------------------------------------------------------- MACE


def test_mace_has_one_key_for_its_device() -> None:
    with pytest.raises(SettingsError, match=r"model.arguments.device is decided by ubmd: set training.device instead"):
        check_arguments({"device": "cuda"}, {"device": True})
    assert [device_argument(name) for name in ("cpu", "cuda")] == ["cpu", "cuda"]
    with pytest.raises(SettingsError, match=r"training.device = 'cuda:1': mace_run_train takes no number of a GPU"):
        device_argument("cuda:1")
