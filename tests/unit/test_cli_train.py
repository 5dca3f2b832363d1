"""The commands around one model, on real files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from typer.testing import CliRunner

from ubmd.calculator import Calculator, Model, Prediction
from ubmd.cli.train import register
from ubmd.cli.training_progress import _PlainProgress
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash, labels_of
from ubmd.data.split import split
from ubmd.data.structures import read_structures
from ubmd.errors import DataError
from ubmd.valid_json import valid_json

SETTINGS = """
training_file = "data/train.extxyz"
output_dir = "{output}"
validation_share = 0.25
seed = 1
[model]
cutoff = 4.0
n_radial = 2
n_basis = 4
hidden = [16, 16]
[training]
epochs = 4
threads = 1
[uncertainty]
projections = 32
alpha = 0.3
"""


def crystal(seed: int) -> Atoms:
    generator = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(np.asarray(atoms.cell) @ (np.eye(3) + generator.uniform(-0.04, 0.04, (3, 3))), scale_atoms=True)
    atoms.positions += generator.uniform(-0.1, 0.1, (len(atoms), 3))
    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


def ubmd(*arguments: object) -> tuple[int, str, str]:
    """Run a command; exit code, stdout, stderr."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def numbers(out: str) -> dict[str, float]:
    """Errors of all structures that `ubmd eval --json` printed."""
    return {key: value for key, value in json.loads(out).items() if isinstance(value, int | float)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, settings file and a trained model."""
    folder = tmp_path_factory.mktemp("train")
    write_structures(folder / "data" / "train.extxyz", [crystal(seed) for seed in range(12)])
    write_structures(folder / "test.extxyz", [crystal(seed) for seed in range(100, 106)])
    (folder / "train.toml").write_text(SETTINGS.format(output=folder / "out"))
    code, out, err = ubmd("train", folder / "train.toml", "--set", "training.epochs=5")
    assert code == 0, err
    (folder / "stdout.txt").write_text(out)
    return folder


def test_train_prints_data_progress_and_errors(folder):
    out = (folder / "stdout.txt").read_text()
    for expected in (
        "training set",
        "9 of 9",
        "3 of 3",
        "epoch 5 of 5",
        "MPa (3 structures)",
        "meV/atom",
        "MPa",
        "kept: epoch",
        " s per epoch, ",
        "in new structures like these, on average at least 70 % of energies have an error below u, and about 70 %",
        "model.pt",
    ):
        assert expected in out
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "checkpoint.pt",
        "learning_curve.png",
        "log.csv",
        "model.pt",
        "weights.pt",
    ]


def test_model_file_knows_its_training_and_calibration(folder):
    code, out, _ = ubmd("info", folder / "out" / "model.pt", "--json")
    metadata = json.loads(out)
    assert code == 0
    structures = read_structures(folder / "data" / "train.extxyz")
    training, validation = split(structures, 0.25, seed=1)
    assert metadata["training_set_hash"] == dataset_hash(training)
    assert metadata["n_training"] == 9
    assert metadata["uncertainty"]["energy"]["n_calibration"] == len(validation) == 3
    assert metadata["settings"]["training"]["epochs"] == 5
    code, out, err = ubmd("info", folder / "out" / "model.pt")
    assert (code, err) == (0, "")  # three structures are enough for the confidence of 70 %
    assert "elements" in out
    assert "Cu" in out


def test_eval_agrees_with_the_labels_and_predictions(folder):
    model, data = folder / "out" / "model.pt", folder / "test.extxyz"
    code, out, _ = ubmd("eval", model, data, "--json", "--precision", "double")
    assert code == 0
    result = json.loads(out)
    structures = read_structures(data)
    predictions = Model(model, "double").predict(structures)
    force, stress, below = [], [], []
    for atoms, predicted in zip(structures, predictions, strict=True):
        labels = labels_of(atoms)
        force.extend((predicted.forces - labels["forces"]).ravel())
        stress.extend((predicted.stress - labels["stress"]) * 160217.66208)
        below.append(abs(predicted.energy - labels["energy"]) / len(atoms) <= predicted.u)
    assert result["force_rmse_eV_per_A"] == pytest.approx(np.sqrt(np.mean(np.square(force))), rel=1e-12)
    assert result["stress_mae_MPa"] == pytest.approx(np.mean(np.abs(stress)), rel=1e-9)
    assert result["energy_share_below_u"] == pytest.approx(np.mean(below))
    assert result["structures"] == 6
    code, out, _ = ubmd("eval", model, data, "--precision", "double")
    assert code == 0
    for expected in ("meV/atom", "eV/Å", "MPa", "% of atoms", f"{result['force_rmse_eV_per_A']:.4g}"):
        assert expected in out


def test_export_again_with_another_confidence(folder, tmp_path):
    weights, data = folder / "out" / "weights.pt", folder / "data" / "train.extxyz"
    arguments = [weights, data, folder / "test.extxyz", "-o", tmp_path / "new.pt", "--set", "projections=32"]
    code, out, _ = ubmd("export", *arguments, "--set", "alpha=0.5")
    assert code == 0
    assert "50 % confidence" in out
    code, _, _ = ubmd("export", *arguments[:-3], tmp_path / "high.pt", "--set", "projections=32", "--set", "alpha=0.2")
    assert code == 0
    low, high = (Model(tmp_path / name, "double") for name in ("new.pt", "high.pt"))
    atoms = read_structures(folder / "test.extxyz")[0]
    assert low.predict_one(atoms).u < high.predict_one(atoms).u
    assert low.predict_one(atoms).energy == high.predict_one(atoms).energy


def test_export_with_and_without_operators(folder, tmp_path):
    weights, data = folder / "out" / "weights.pt", folder / "data" / "train.extxyz"
    predictions = []
    for option, operators in (("--no-operators", []), ("--operators", ["ubmd"])):
        path = tmp_path / "model.pt"
        code, _, err = ubmd("export", weights, data, folder / "test.extxyz", "-o", path, option)
        assert code == 0, err
        evaluator = Model(path, "double")
        assert evaluator.metadata["operators"] == operators
        predictions.append(evaluator.predict_one(read_structures(folder / "test.extxyz")[0]))
    plain, fused = predictions
    assert fused.energy == pytest.approx(plain.energy, rel=1e-12)
    assert fused.u == pytest.approx(plain.u, rel=1e-6)


def test_ensemble_is_trained_and_exported_again(folder, tmp_path):
    data = folder / "data" / "train.extxyz"
    changes = [f'training_file="{data}"', f"output_dir={tmp_path / 'out'}", "uncertainty.kind=ensemble"]
    (tmp_path / "train.toml").write_text((folder / "train.toml").read_text())
    overrides = [part for change in [*changes, "uncertainty.members=2"] for part in ("--set", change)]
    code, out, err = ubmd("train", tmp_path / "train.toml", *overrides)
    assert code == 0, err
    assert "epoch 8 of 8" in out
    weights = [tmp_path / "out" / f"member_{m}" / "weights.pt" for m in (0, 1)]
    evaluator = Model(tmp_path / "out" / "model.pt", "double")
    assert evaluator.metadata["uncertainty"]["members"] == evaluator.metadata["uncertainty"]["projections"] == 2
    arguments = ["export", weights[0], data, folder / "test.extxyz", "-o", tmp_path / "new.pt"]
    arguments += ["--set", "kind=ensemble", "--set", "members=2"]
    code, _, err = ubmd(*arguments)
    assert code == 1
    assert "needs 2 trained networks" in err
    assert ubmd(*arguments, "--member", weights[1])[0] == 0
    atoms = read_structures(folder / "test.extxyz")[0]
    assert Model(tmp_path / "new.pt", "double").predict_one(atoms).energy == evaluator.predict_one(atoms).energy


def test_resume_is_the_default_and_fresh_starts_again(folder, tmp_path):
    (tmp_path / "train.toml").write_text((folder / "train.toml").read_text())
    data = f'training_file="{folder / "data" / "train.extxyz"}"'
    base = ["train", tmp_path / "train.toml", "--set", data, "--set", f"output_dir={tmp_path / 'out'}"]
    assert ubmd(*base)[0] == 0
    code, out, _ = ubmd(*base)
    assert code == 0
    assert "epoch 1 of" not in out, "the finished training must not run again"
    code, out, err = ubmd(*base, "--set", "training.learning_rate=0.01")
    assert code == 1
    assert "training.learning_rate was 0.03, now 0.01" in err
    assert "--fresh" in err
    code, out, err = ubmd(*base, "--set", "training.learning_rate=0.01", "--fresh")
    assert code == 0, err
    assert "epoch 1 of 4" in out


def test_schema_lists_units(folder):
    code, out, _ = ubmd("schema", "train")
    assert code == 0
    schema = json.loads(out)
    assert "Å" in schema["$defs"]["ModelSettings"]["properties"]["cutoff"]["description"]
    assert "run_dir" in json.loads(ubmd("schema")[1])["properties"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.toml"], "There is no settings file missing.toml."),
        (["train", "{folder}/train.toml", "--set", "training.epoch=3"], "did you mean 'epochs'?"),
        (["train", "{folder}/train.toml", "--set", "training_file=no.extxyz"], "There is no file {folder}/no.extxyz."),
        (["eval", "missing.pt", "{folder}/test.extxyz"], "There is no model file missing.pt."),
        (["eval", "{folder}/train.toml", "{folder}/test.extxyz"], "is not a ubmd model file"),
        (["eval", "{folder}/out/model.pt", "{folder}/none.extxyz"], "There is no file {folder}/none.extxyz."),
        (["eval", "{folder}/out/model.pt", "{folder}/test.extxyz", "--label", "energy"], "--label needs LABEL=KEY"),
        (["eval", "{folder}/out/model.pt", "{folder}/test.extxyz", "--precision", "half"], "Precision must be"),
        (["info", "{folder}/out/weights.pt"], "is not a ubmd model file"),
        (["export", "{folder}/out/model.pt", "{folder}/test.extxyz", "{folder}/test.extxyz"], "not a weights file"),
        (["schema", "nothing"], "There is no schema of 'nothing'; choose run, dynamic, train, history or events."),
    ],
)
def test_mistakes_are_one_sentence_on_stderr(folder, arguments, message):
    code, out, err = ubmd(*[argument.format(folder=folder) for argument in arguments])
    assert code == 1
    assert message.format(folder=folder) in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_atoms_at_one_place_and_cells_that_are_no_lattice(folder, tmp_path):
    """Today's process must survive, and file, frame and atoms be named, whatever reads the structures."""
    structures = read_structures(folder / "data" / "train.extxyz")
    model = folder / "out" / "model.pt"
    bad = structures[5].copy()
    bad.positions[2] = bad.positions[0] + bad.cell[1]
    bad.calc = SinglePointCalculator(bad, **labels_of(structures[5]))
    data = tmp_path / "train.extxyz"
    write_structures(data, [*structures[:5], bad, *structures[6:]])
    sentence = "train.extxyz, frame 5: atoms 0 (Cu) and 2 (Cu), counted from 0, are at the same place"
    train = ["train", folder / "train.toml", "--set", f'training_file="{data}"', "--set", f"output_dir={tmp_path}/out"]
    for arguments in (["eval", model, data], ["eval", model, data, "--json"], train):
        code, out, err = ubmd(*arguments)
        assert code == 1
        assert sentence in err
        assert not out
    bad.calc = Calculator(model)
    with pytest.raises(DataError, match=r"^atoms 0 \(Cu\) and 2 \(Cu\)"):
        bad.get_potential_energy()
    with pytest.raises(DataError, match=r"^structure 1: atoms 0 \(Cu\) and 2 \(Cu\)"):
        Model(model).predict([structures[0], bad])
    flat = Atoms("Cu2", [[0, 0, 0], [2, 0, 1]], cell=[[4, 0, 0], [8, 0, 0], [0, 0, 20]], pbc=[True, True, False])
    flat.calc = Calculator(model)
    with pytest.raises(DataError, match="periodic along vectors a and b, but these cell vectors are parallel"):
        flat.get_forces()


def test_json_is_json_whatever_a_model_says(folder, tmp_path, monkeypatch):
    """A number that is not finite is an error in eval, and null or text in info."""
    from ubmd.potentials.evaluator import NetworkEvaluator

    honest = NetworkEvaluator.predict

    def broken(self: NetworkEvaluator, structures: list[Atoms]) -> list[Prediction]:
        found = honest(self, structures)
        return [replace(found[0]), replace(found[1], forces=np.nan * found[1].forces), *found[2:]]

    monkeypatch.setattr(NetworkEvaluator, "predict", broken)
    code, out, err = ubmd("eval", folder / "out" / "model.pt", folder / "test.extxyz", "--json")
    assert (code, out) == (1, "")
    assert "test.extxyz, frame 1: the model gives no finite forces" in err
    record = {"a": [float("nan"), 1.5], "b": {"c": float("-inf"), "d": None, "e": "x"}}
    assert json.loads(json.dumps(valid_json(record), allow_nan=False)) == {
        "a": [None, 1.5],
        "b": {"c": "-inf", "d": None, "e": "x"},
    }


def renamed(structures: list[Atoms]) -> list[Atoms]:
    """The same labels under other keys, wrong ones under the usual keys, and a virial instead of a stress."""
    copies = []
    for atoms in structures:
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, energy=0.0, forces=np.zeros((len(atoms), 3)))
        copy.info["E"] = atoms.get_potential_energy()
        copy.info["W"] = -atoms.get_volume() * atoms.get_stress(voigt=False)
        copy.set_array("F", atoms.get_forces())
        copies.append(copy)
    return copies


def test_keys_of_labels_in_settings_and_options(folder, tmp_path):
    """The same model and errors, whatever the keys are called."""
    for name in ("data/train.extxyz", "test.extxyz"):
        write_structures(tmp_path / name, renamed(read_structures(folder / name)))
    labels = 'labels = {energy = "E", forces = "F", virial = "W"}\n'
    text = SETTINGS.format(output=tmp_path / "out").replace("epochs = 4", "epochs = 5")
    (tmp_path / "train.toml").write_bytes(b"\xef\xbb\xbf" + (labels + text).encode())
    code, _, err = ubmd("train", tmp_path / "train.toml")
    assert code == 0, err
    options = [word for pair in ("energy=E", "forces=F", "virial=W") for word in ("--label", pair)]
    models = folder / "out" / "model.pt", tmp_path / "out" / "model.pt"
    results = []
    for model, data, keys in zip(models, (folder, tmp_path), ([], options), strict=True):
        code, out, err = ubmd("eval", model, data / "test.extxyz", "--json", *keys)
        assert code == 0, err
        assert not err
        results.append(numbers(out))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    weights, train = tmp_path / "out" / "weights.pt", tmp_path / "data" / "train.extxyz"
    export = ["export", weights, train, tmp_path / "test.extxyz", "-o", tmp_path / "new.pt", "--set", "projections=32"]
    assert ubmd(*export, *options)[0] == 0
    metadata = [Model(path).metadata for path in (models[1], tmp_path / "new.pt")]
    assert metadata[1]["uncertainty"]["energy"]["n_calibration"] == 6
    hashes = [dataset_hash(read_structures(train, {"energy": "E", "forces": "F", "virial": "W"}))]
    assert metadata[1]["training_set_hash"] == hashes[0]
    code, _, err = ubmd("eval", models[0], tmp_path / "test.extxyz", "--label", "energy=E", "--label", "energy=F")
    assert code == 1
    assert "--label names two keys for energy: E and F; give one." in err


def test_every_command_says_where_labels_were_taken_from(folder, tmp_path):
    """Energies in Ha: the same model and errors as from the file in eV, and one line per file."""
    for name in ("data/train.extxyz", "test.extxyz"):
        copies = renamed(read_structures(folder / name))
        for copy in copies:
            copy.info["E"] /= 27.211386245981
        write_structures(tmp_path / name, copies)
    (tmp_path / "train.toml").write_text(SETTINGS.format(output=tmp_path / "out").replace("epochs = 4", "epochs = 5"))
    options = [word for pair in ("energy=E:Ha", "forces=F", "virial=W") for word in ("--label", pair)]
    code, out, err = ubmd("train", tmp_path / "train.toml", *options)
    assert code == 0, err
    line = "energy from E (Ha), forces from F (eV/Å), stress from W (eV)."
    assert out.count(f"Labels of data/train.extxyz: {line}\n") == 1
    model, test = tmp_path / "out" / "model.pt", tmp_path / "test.extxyz"
    code, out, err = ubmd("eval", model, test, *options)
    assert f"Labels of {test}: {line}\n" in out
    results = []
    for path, data, keys in ((model, tmp_path, options), (folder / "out" / "model.pt", folder, [])):
        code, out, err = ubmd("eval", path, data / "test.extxyz", "--json", *keys)
        assert code == 0, err
        results.append(numbers(out))
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    files = [tmp_path / "out" / "weights.pt", tmp_path / "data" / "train.extxyz", test]
    code, out, err = ubmd("export", *files, "-o", tmp_path / "new.pt", "--set", "projections=32", *options)
    assert code == 0, err
    assert [text for text in out.splitlines() if text.startswith("Labels of")] == [
        f"Labels of {path}: {line}" for path in files[1:]
    ]
    code, _, err = ubmd("eval", model, test, "--label", "energy=E:ha")
    assert code == 1
    assert "--label: labels.energy = 'E:ha': 'ha' is not a unit of an energy (did you mean 'Ha'?); known are" in err


def test_remarks_are_on_stderr(folder, tmp_path):
    structures = read_structures(folder / "test.extxyz")
    for atoms in structures:
        atoms.calc = SinglePointCalculator(atoms, **{**labels_of(atoms), "stress": 160.2 * labels_of(atoms)["stress"]})
    write_structures(tmp_path / "test.extxyz", structures)
    code, out, err = ubmd("eval", folder / "out" / "model.pt", tmp_path / "test.extxyz", "--json")
    assert code == 0
    assert json.loads(out)["structures"] == 6
    assert err.startswith(f"Remark: {tmp_path / 'test.extxyz'}: stresses of up to")
    assert err.count("\n") == 1


def test_labels_of_two_states_are_remarked_on(folder, tmp_path):
    structures = read_structures(folder / "data" / "train.extxyz")
    structures[3].info["charge"] = 1
    write_structures(tmp_path / "train.extxyz", structures)
    settings = tmp_path / "train.toml"
    settings.write_text(SETTINGS.format(output=tmp_path / "out").replace("data/train.extxyz", "train.extxyz"))
    code, _, err = ubmd("train", settings, "--set", "training.epochs=1")
    assert code == 0, err
    assert "Remark: train.extxyz: frames 0 and 3 have the same composition but charge = not given and 1, which" in err


def test_plain_progress_is_sparse_and_estimates_the_time_left(capsys):
    from rich.console import Console

    report = _PlainProgress(Console(width=200), {"train": 4, "valid": 1})
    row = {"seconds": 2.0, "epochs": 100, "train_energy_rmse_meV_per_atom": 1.0, "train_force_rmse_eV_per_A": 0.5}
    for epoch in range(1, 101):
        report({**row, "epoch": epoch})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1 of 100", "epoch 100 of 100"]
    assert "3 min 18 s left" in lines[0]
    assert lines[1].endswith("F 0.5000 eV/Å (4 structures), 0 s left")
    report({"epoch": 100, "epochs": 100, "valid_force_rmse_eV_per_A": 0.25})  # a back end may know less
    assert capsys.readouterr().out == "epoch 100 of 100: valid F 0.2500 eV/Å (1 structure), 0 s left\n"


def test_from_an_earlier_model_and_on_with_more_epochs(folder, tmp_path):
    (tmp_path / "train.toml").write_text((folder / "train.toml").read_text())
    data = f'training_file="{folder / "data" / "train.extxyz"}"'
    base = ["train", tmp_path / "train.toml", "--set", data, "--set", f"output_dir={tmp_path / 'out'}"]
    code, out, err = ubmd(*base, "--from", folder / "out")
    assert code == 0, err
    assert f"starts from {folder / 'out' / 'model.pt'}." in out
    assert "epoch 1 of 4" in out
    code, out, err = ubmd(*base, "--from", folder / "out", "--set", "training.epochs=6")
    assert code == 0, err
    assert "Continues after epoch 4 of 4, with the optimiser as it was, to epoch 6." in out
    assert "epoch 1 of" not in out
    code, out, err = ubmd(*base, "--from", tmp_path / "nowhere")
    assert (code, err.splitlines()) == (1, [f"Error: --from: there is no file {tmp_path / 'nowhere'}."])
