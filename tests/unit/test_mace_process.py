"""How MACE's Python is started, watched and ended, without MACE.

The package is a false one, since the real one is large and rare; what is false is its command alone: the interpreter,
the script that runs in it, its log and its end are real. With the real package: `tests/learning/test_mace.py`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from alloy import alloy
from command_line import UBMD
from processes import is_alive, linux, wait_for
from typer.testing import CliRunner

from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.errors import ModelError, SettingsError, TrainingError
from ubmd.potentials.history import read
from ubmd.potentials.kinds import backend_of
from ubmd.potentials.mace.arguments import DECIDED, check_arguments, command_line, training_arguments
from ubmd.potentials.mace.backend import Mace
from ubmd.potentials.mace.environment import Environment
from ubmd.potentials.mace.log import Progress, kept_epoch, summary
from ubmd.settings import ModelSettings, UncertaintySettings

RUN_TRAIN = """
import json, os, sys, time
from pathlib import Path
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
work = Path(given["work_dir"])
(work / "pid").write_text(str(os.getpid()))
if given.get("lr") == "bad":
    sys.exit("lr is bad")
log = work / "results" / f"ubmd_run-{given['seed']}_train.txt"
log.parent.mkdir(exist_ok=True)
done = len(log.read_text().splitlines()) if log.exists() and given["restart_latest"] == "True" else 0
for epoch in range(done, int(given["max_num_epochs"])):
    with log.open("a") as file:
        row = {"mode": "eval", "epoch": epoch, "rmse_e_per_atom": 0.5, "rmse_f": 1.0}
        file.write(json.dumps(row) + "\\n")
    time.sleep(0.1)
(work / "ubmd.model").write_bytes(b"a network")
"""
TOOLS = """
import argparse
def build_default_arg_parser():
    parser = argparse.ArgumentParser()
    for name in ("lr", "num_channels", *%r):
        parser.add_argument("--" + name)
    parser.add_argument("--ema", action="store_true")
    return parser
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter with a false package mace, and what mace_run_train takes."""
    package = tmp_path / "false" / "mace"
    for name in ("", "cli", "tools"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("")
    (package / "cli" / "run_train.py").write_text(RUN_TRAIN)
    (package / "tools" / "__init__.py").write_text(TOOLS % (tuple(DECIDED),))
    for name in ("mace_torch", "e3nn"):
        folder = tmp_path / "false" / f"{name}-0.0.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.0\n")
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "false"} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def train_file(python: Path, tmp_path: Path) -> Path:
    write_structures(tmp_path / "train.extxyz", [alloy(seed) for seed in range(6)])
    values = {
        "training_file": "train.extxyz",
        "output_dir": str(tmp_path / "out"),
        "model": {"kind": "mace", "python": "python", "arguments": {"lr": 0.1}},
        "training": {"epochs": 200, "threads": 1},
    }
    (tmp_path / "train.toml").write_text(tomli_w.dumps(values))
    return tmp_path / "train.toml"


@linux
def test_a_killed_driver_takes_its_training_along_and_the_next_one_resumes(train_file: Path, tmp_path: Path) -> None:
    work = tmp_path / "out" / "mace"
    log = work / "results" / "ubmd_run-0_train.txt"
    driver = subprocess.Popen([*UBMD, "train", str(train_file)], stdout=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3, 60.0)
        trainer = int((work / "pid").read_text())
        assert is_alive(trainer)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert wait_for(lambda: not is_alive(trainer), 5.0)
    before = len(log.read_text().splitlines())
    done = CliRunner().invoke(app, ["train", str(train_file), "--set", f"training.epochs={before + 5}"])
    # the false package has no network to convert: what is seen is the end of the training
    assert done.exit_code == 1
    assert "has no package e3nn" in done.output
    rows = [json.loads(line)["epoch"] for line in log.read_text().splitlines()]
    assert rows == list(range(before + 5))
    assert f" of {before + 5}: valid E 500.00 meV/atom, F 1.0000 eV/Å" in done.output


@linux
def test_an_error_while_watching_ends_the_training(python: Path, tmp_path: Path) -> None:
    """Ctrl-C, a full disk, another process that has taken over: whatever `report` raises."""

    def tick() -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    line = command_line({"work_dir": tmp_path, "seed": 1, "max_num_epochs": 900, "restart_latest": True}, {})
    with pytest.raises(KeyboardInterrupt):
        Environment(python).train(line, 1, tmp_path, tick)
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_the_last_line_of_a_failed_training_is_in_the_sentence(python: Path, tmp_path: Path) -> None:
    words = r"mace_run_train in .*python ended with exit status 1: lr is bad \(all of it is in .*train.err\)"
    with pytest.raises(TrainingError, match=words):
        Environment(python).train(command_line({"work_dir": tmp_path, "lr": "bad"}, {}), 1, tmp_path, lambda: None)


def test_a_python_without_mace_is_said(tmp_path: Path) -> None:
    """This one, for instance."""
    empty = tmp_path / "empty-python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    empty.chmod(0o755)
    with pytest.raises(SettingsError, match="has no package mace; make an environment for MACE with: python -m venv"):
        Environment(empty).ask("versions")
    broken = tmp_path / "broken"
    broken.write_text("no program")
    with pytest.raises(SettingsError, match=r"broken cannot be started \(permission denied\)"):
        Environment(broken).ask("versions")


def test_what_the_settings_lack_is_said(python: Path, tmp_path: Path) -> None:
    for keys, words in (
        ({}, r"needs model.python, an interpreter that has the package mace"),
        ({"python": "nowhere/python"}, r"model.python: there is no file .*nowhere/python"),
        ({"python": "python", "checkpoint": "my.model"}, r"model.checkpoint: there is no file .*my.model"),
    ):
        with pytest.raises(SettingsError, match=words):
            backend_of(ModelSettings.model_validate({"kind": "mace", **keys}), tmp_path)


def test_arguments_are_looked_up_in_the_package(python: Path, tmp_path: Path) -> None:
    made = backend_of(ModelSettings(kind="mace", python=Path("python"), arguments={"num_chanels": 8}), tmp_path)
    assert isinstance(made, Mace)
    with pytest.raises(SettingsError, match="has no argument 'num_chanels'; did you mean 'num_channels'"):
        made.check()
    known = {"lr": True, "ema": False, **dict.fromkeys(DECIDED, True)}
    with pytest.raises(SettingsError, match=r"max_num_epochs is decided by ubmd: set training.epochs instead"):
        check_arguments({"max_num_epochs": 5}, known)
    with pytest.raises(SettingsError, match=r"work_dir is decided by ubmd: remove it"):
        check_arguments({"work_dir": "a"}, known)
    assert command_line({"lr": 0.1, "ema": True, "swa": False}, known | {"swa": False}) == ["--lr=0.1", "--ema"]


def test_arguments_of_the_user_win_over_usual_ones(tmp_path: Path) -> None:
    files, options = (tmp_path / "a.xyz", tmp_path / "b.xyz"), {"seed": 4, "max_num_epochs": 7}
    scratch = training_arguments({"E0s": "{29: -1.0}"}, files, tmp_path, None, options)
    assert (scratch["E0s"], scratch["seed"], scratch["restart_latest"]) == ("{29: -1.0}", 4, True)
    assert "foundation_model" not in scratch
    tuned = training_arguments({}, files, tmp_path, tmp_path / "my.model", options)
    assert (tuned["E0s"], tuned["foundation_model"]) == ("foundation", tmp_path / "my.model")


def test_a_log_that_grows_is_reported_line_by_line(tmp_path: Path) -> None:
    rows: list[dict] = []
    log = tmp_path / "mace" / "results" / "ubmd_run-3_train.txt"
    log.parent.mkdir(parents=True)
    progress = Progress(tmp_path / "mace", "ubmd_run-3", 9, tmp_path, rows.append)
    progress()
    assert not (tmp_path / "log.csv").exists()
    with log.open("a") as file:
        file.write('{"mode": "eval", "epoch": null, "rmse_f": 3.0}\n{"mode": "opt", "epoch": 0, "loss": 1.0}\n')
        file.write('{"mode": "eval", "epoch": 0, "rmse_f": 2.0, "rmse_e_per_atom": 0.25, "time": 0.5}\n{"mode": "ev')
        file.flush()
        progress()
        progress()
        file.write('al", "epoch": 1, "rmse_f": 1.0}\nnoise\n')
    progress()
    same = {"epochs": 9, "best": 0}
    first = {"epoch": 1, "loss": 1.0, "valid_energy_rmse_meV_per_atom": 250.0, "valid_force_rmse_eV_per_A": 2.0}
    assert rows == [
        {**same, **first, "seconds": 0.5},
        {**same, "epoch": 2, "valid_force_rmse_eV_per_A": 1.0, "seconds": 0.0},
    ]
    assert [row["epoch"] for row in read(tmp_path / "log.csv")] == [1, 2]


def logged(*epochs: int, force: float = 1.0) -> str:
    """What MACE writes from its start on: two mini-batches per epoch."""
    lines = [{"mode": "eval", "epoch": None, "rmse_f": 9.0, "time": 50.0}]
    for epoch in epochs:
        lines += [{"mode": "opt", "epoch": epoch, "loss": loss, "time": 1.0} for loss in (3.0, 5.0)]
        lines.append({"mode": "eval", "epoch": epoch, "rmse_f": force, "rmse_stress": 1.0, "time": 0.25})
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_epochs_after_an_interruption_take_the_place_of_lost_ones(tmp_path: Path) -> None:
    """Killed in its fifth epoch, resumed from the checkpoint of the third, ended early by patience."""
    work = tmp_path / "mace"
    log = work / "results" / "ubmd_run-3_train.txt"
    for file in (
        log,
        *(work / "checkpoints" / f"ubmd_run-{name}" for name in ("3_epoch-2.pt", "3.model", "31_epoch-9.pt")),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    log.write_text(logged(0, 1, 2, 3, 4).removesuffix("\n")[:-20])  # within a line
    rows: list[dict] = []
    progress = Progress(work, "ubmd_run-3", 9, tmp_path, rows.append)
    with log.open("a") as file:
        file.write(logged(2, 3, force=0.5))
    progress.finish()
    assert [row["epoch"] for row in rows] == [3, 4]  # earlier ones have been reported to another process
    found = read(tmp_path / "log.csv")
    assert [(row["epoch"], row["valid_force_rmse_eV_per_A"], row["best"]) for row in found] == [
        (1, 1.0, 0),
        (2, 1.0, 0),
        (3, 0.5, 1),
        (4, 0.5, 0),
    ]
    assert {row["loss"] for row in found} == {4.0}
    assert found[0]["valid_stress_rmse_MPa"] == pytest.approx(160218, abs=1)
    kept = summary(tmp_path)
    assert kept is not None
    assert (kept.best["epoch"], kept.epochs, kept.seconds) == (3, 4, 4 * 2.25)
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert summary(work) is None  # nothing was trained there


def test_the_epoch_that_is_kept_is_that_of_the_last_checkpoint(tmp_path: Path) -> None:
    """Of stage two, if it has come so far."""
    (tmp_path / "checkpoints").mkdir()
    assert kept_epoch(tmp_path, "ubmd_run-3") is None
    for names, kept in ((("epoch-9.pt", "epoch-17.pt"), 18), (("epoch-14_swa.pt", "epoch-8_swa.pt"), 15)):
        for name in names:
            (tmp_path / "checkpoints" / f"ubmd_run-3_{name}").touch()
        assert kept_epoch(tmp_path, "ubmd_run-3") == kept


def test_other_files_are_no_checkpoints(python: Path, tmp_path: Path) -> None:
    made = backend_of(ModelSettings(kind="mace", python=Path("python")), tmp_path)
    assert isinstance(made, Mace)
    with pytest.raises(ModelError, match="There is no file"):
        made.convert(tmp_path / "my.model", UncertaintySettings(), tmp_path / "module.pt")
