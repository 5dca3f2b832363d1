"""`ubmd eval`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import typer
from alloy import LABELS, alloy, trained_alloy, without
from ase import Atoms
from rich.console import Console
from typer.testing import CliRunner

from ubmd import Calculator, evaluate
from ubmd.cli import training_progress
from ubmd.cli.train import register
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt; test.extxyz; bare.extxyz without labels; mixed.extxyz, whose second frame is labelled."""
    folder = trained_alloy(tmp_path_factory.mktemp("cli_evaluate"))
    bare = [without(alloy(seed), *LABELS) for seed in range(40, 44)]
    write_structures(folder / "bare.extxyz", bare)
    write_structures(folder / "mixed.extxyz", [bare[0], alloy(41), *bare[2:]])
    write_structures(folder / "unknown.extxyz", [bare[0], Atoms("CuNi", [[0, 0, 0], [2.5, 0, 0]])])
    return folder


def run(folder: Path, *arguments: object) -> tuple[int, str, str]:
    """`ubmd eval model.pt ...`, files in this folder: exit code, stdout, stderr."""
    app = typer.Typer()
    register(app)
    words = [str(folder / a) if str(a).endswith("xyz") else str(a) for a in arguments]
    result = CliRunner().invoke(app, ["eval", str(folder / "model.pt"), *words], env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def strict(text: str) -> Any:
    """JSON as its standard has it: no NaN or Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def cells(out: str, title: str) -> list[list[str]]:
    """Rows of the table with this title."""
    lines = out[out.index(title) :].splitlines()
    end = next((k for k, line in enumerate(lines) if line.startswith("└")), len(lines))
    return [[cell.strip() for cell in line.strip("│ ").split("│")] for line in lines[:end] if line.startswith("│")]


def test_tables_say_what_the_object_says(folder):
    code, out, err = run(folder, "test.extxyz", "--worst", 2)
    assert (code, err) == (0, "")
    found = evaluate(folder / "model.pt", folder / "test.extxyz")
    errors = found.errors()
    assert cells(out, "errors: 6 structures")[1][:5] == [
        "force",
        f"{errors['force_rmse_eV_per_A']:.4g}",
        f"{errors['force_mae_eV_per_A']:.4g}",
        "eV/Å",
        f"{errors['force_rmse_percent']:.3g} %",
    ]
    by_element = cells(out, "by element")
    assert [row[:2] for row in by_element] == [["Au", "6"], ["Cu", "18"]]
    assert by_element[0][2] == f"{found.by_element()['Au']['force_rmse_eV_per_A']:.4g}"
    groups = {name: part.errors()["force_rmse_eV_per_A"] for name, part in found.groups("config_type").items()}
    assert [(row[0], row[1], row[3]) for row in cells(out, "by config_type")] == [
        (name, "3", f"{value:.4g}") for name, value in groups.items()
    ]
    assert [row[:3] for row in cells(out, "largest force errors")] == [
        [str(row.frame), str(row.atom), row.element] for row in found.worst(2)
    ]
    assert f"Spearman {errors['spearman_max_u_error']:.2f}, Pearson {errors['pearson_max_u_error']:.2f}." in out
    assert "most uncertain" not in out


def test_without_labels_the_most_uncertain_frames_are_listed(folder):
    code, out, err = run(folder, "bare.extxyz")
    assert (code, err) == (0, "")
    assert f"{folder / 'bare.extxyz'} has no labels: uncertainties only." in out.replace("\n", "")
    assert "errors:" not in out
    found = evaluate(folder / "model.pt", folder / "bare.extxyz")
    rows = cells(out, "most uncertain")
    assert [row[0] for row in rows] == [str(k) for k in np.argsort(-found.max_u)]
    assert rows[0][3] == f"{found.max_u.max():.4g}"
    assert [row[0] for row in cells(out, "by element")] == ["Au", "Cu"]


def test_json_is_strict_and_alone_on_stdout(folder, tmp_path):
    for name, labelled in (("test", 6), ("bare", 0), ("mixed", 1)):
        code, out, _ = run(folder, f"{name}.extxyz", "--json", "--out", tmp_path / name)
        assert code == 0
        result = strict(out)
        assert result == strict((tmp_path / name / "errors.json").read_text())
        assert result["labelled"] == labelled
        assert (result["force_rmse_eV_per_A"] is None) == (labelled == 0)
        assert len(result["worst"]) == min(5, labelled)
    assert result["worst"][0]["frame"] == 1
    assert result["worst"][0]["file"] == str(folder / "mixed.extxyz")
    assert result["spearman_max_u_error"] is None, "one structure has no correlation"


def test_files_are_written_where_one_says_and_hold_predictions(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(folder, "test.extxyz")[0] == 0
    assert not list(tmp_path.iterdir()), "nothing is written without --out"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, out, err = run(folder, "test.extxyz", "mixed.extxyz", "--worst", 3, "--out", "out")
    assert code == 0, err
    assert {path.name for path in Path("out").iterdir()} == {
        "calibration.png",
        "errors.json",
        "mine.txt",
        "parity.png",
        "predictions.extxyz",
        "uncertainties.png",
        "worst.extxyz",
    }
    assert out.count("wrote out/") == 6
    frames, worst = (ase.io.read(f"out/{name}.extxyz", ":") for name in ("predictions", "worst"))
    found = evaluate(folder / "model.pt", folder / "test.extxyz")
    assert (len(frames), len(worst)) == (10, 3)
    assert frames[2].get_potential_energy() == pytest.approx(found[2].energy)
    assert frames[7].info["source_file"] == str(folder / "mixed.extxyz")
    assert [atoms.info["source_frame"] for atoms in frames] == [*range(6), *range(4)]
    listed = [(row[0], int(row[1])) for row in cells(out, "largest force errors")]
    assert [atoms.info["source_frame"] for atoms in worst] == [number for _, number in listed]
    assert run(folder, "bare.extxyz", "--out", "out")[0] == 0
    assert not Path("out/parity.png").exists(), "the picture of other data must not stay"
    assert Path("out/mine.txt").exists()
    assert len(ase.io.read("out/worst.extxyz", ":")) == 4


def test_a_file_that_is_read_is_not_replaced(folder, tmp_path):
    (tmp_path / "worst.extxyz").write_bytes((folder / "test.extxyz").read_bytes())
    code, _, err = run(folder, tmp_path / "worst.extxyz", "--out", tmp_path)
    assert code == 1
    assert f"--out {tmp_path}: worst.extxyz would replace the file" in err
    assert len(list(tmp_path.iterdir())) == 1


def test_several_files_have_a_row_each(folder):
    code, out, err = run(folder, "test.extxyz", "bare.extxyz", "--json", "--by", "config_type")
    assert code == 0, err
    result = strict(out)
    files = {Path(name).name: errors["structures"] for name, errors in result["by"]["file"].items()}
    assert files == {"test.extxyz": 6, "bare.extxyz": 4}
    counts = {name: errors["structures"] for name, errors in result["by"]["config_type"].items()}
    assert counts == {"(none)": 4, "bulk": 3, "strained": 3}
    assert run(folder, "test.extxyz", "test.extxyz", "--json")[1] == run(folder, "test.extxyz", "--json")[1]


def test_unknown_elements_are_refused_or_left_out(folder):
    code, out, err = run(folder, "unknown.extxyz")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "unknown.extxyz, frame 1: the model does not know Ni, only Cu, Au; remove the frame" in err
    code, out, err = run(folder, "unknown.extxyz", "--skip-unknown", "--json")
    assert code == 0
    assert strict(out)["structures"] == 1
    assert [row["frame"] for row in strict(out)["skipped"]] == [1]
    assert "Remark: 1 frame left out, with elements that the model does not know; the first is" in err
    assert err.count("\n") == 1


def test_mistakes_are_one_sentence(folder, tmp_path):
    text = (folder / "test.extxyz").read_text()
    (tmp_path / "nan.extxyz").write_text(text.replace(" energy=", " energy=NaN was=", 1))
    (tmp_path / "empty.extxyz").write_text("")
    for arguments, message in (
        (["test.extxyz", "--by", "config_typ"], "--by config_typ: no frame has this key; did you mean 'config_type'?"),
        (["bare.extxyz", "--by", "config_type"], "--by config_type: no frame has this key; keys of the frames: none."),
        ([tmp_path / "nan.extxyz"], "nan.extxyz, frame 0: NaN or infinity in the energy"),
        ([tmp_path / "empty.extxyz"], "empty.extxyz holds no structures."),
        (["mixed.extxyz", "--label", "energy=qm"], "mixed.extxyz, frame 0: there is no 'qm', which the mapping names"),
    ):
        code, out, err = run(folder, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert message in err


def test_a_key_that_may_hold_labels_is_suggested(folder, tmp_path):
    """A misspelt key must not make all labels vanish without a word."""
    frames = read_structures(folder / "bare.extxyz")
    for atoms in frames:
        atoms.info["my_energy"] = 1.0
    write_structures(tmp_path / "named.extxyz", frames)
    code, _, err = run(folder, tmp_path / "named.extxyz")
    assert code == 0
    assert "no energy found under the usual keys, perhaps 'my_energy'; name its key with --label energy=KEY." in err
    named = [tmp_path / "named.extxyz", "--label", "energy=my_energy"]
    code, out, err = run(folder, *named, "--json", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"parity.png", "uncertainties.png"}
    assert strict(out)["labelled"] == 4
    assert strict(out)["energy_rmse_meV_per_atom"] > 100
    assert strict(out)["force_rmse_eV_per_A"] is None


def test_a_trajectory_of_the_model_itself_is_remarked_on(folder, tmp_path):
    """Its energies and forces look like perfect labels."""
    frames = read_structures(folder / "bare.extxyz")
    for atoms in frames:
        atoms.calc = Calculator(folder / "model.pt")
        atoms.get_forces()
    ase.io.write(tmp_path / "md.extxyz", frames)
    code, _, err = run(folder, tmp_path / "md.extxyz", "--json")
    assert code == 0
    assert "they were probably computed with this model, so errors say nothing." in err
    assert "probably" not in run(folder, "test.extxyz", "--json")[2]


def test_long_evaluations_say_how_long_they_take(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(training_progress.time, "monotonic", lambda: next(clock))
    with training_progress.count_progress(Console(width=200)) as line:
        for done in (10, 40, 50, 80):
            line("structures", done, 100)
    assert capsys.readouterr().out == (
        "40 of 100 structures, 20 s, about 30 s to go\n80 of 100 structures, 40 s, about 10 s to go\n"
    )


def test_tables_fit_into_eighty_columns(folder):
    """Nothing of the headings may be cut off."""
    app = typer.Typer()
    register(app)
    files = [str(folder / f"{name}.extxyz") for name in ("test", "mixed")]
    result = CliRunner().invoke(app, ["eval", str(folder / "model.pt"), *files], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    tables = [line for line in result.stdout.splitlines() if line[:1] in "│┃┏└"]
    assert max(map(len, tables)) <= 80
    assert "…" not in result.stdout
    for word in ("relative", "structures", "config_type", "meV/atom"):
        assert word in result.stdout
