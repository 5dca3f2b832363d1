"""Dynamic runs on the command line: settings and their mistakes, check, run, status, progress lines."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from ase import Atoms
from ase.build import bulk, make_supercell
from rich.console import Console
from silicon import make_settings, settings_table, write_inputs
from typer.testing import CliRunner

from ubmd.cli.dynamic_progress import ProgressBars, ProgressLines, describe_event
from ubmd.cli.dynamic_status import status
from ubmd.cli.main import app
from ubmd.cli.template import dynamic_template
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.lammps.triggers import make_trigger
from ubmd.learning import RunFolder
from ubmd.learning.dynamic.timeline import DynamicTimeline
from ubmd.potentials.force_constants.learner import ForceConstants
from ubmd.runs.event_records import read_event
from ubmd.runs.schedules import DYNAMIC, LOOP, schedule_of_file
from ubmd.settings import load_settings
from ubmd.settings import make_settings as from_table
from ubmd.settings.dynamic import DynamicRunSettings, DynamicSettings, TriggerSettings


def ubmd(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    command = [Path(sys.executable).with_name("ubmd"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder with a finished run, what `ubmd run` has printed)."""
    folder = tmp_path_factory.mktemp("cli")
    table = settings_table(Path("run"))
    table["dynamic"]["labels"] = 3
    write_inputs(folder, folder / "run")
    (folder / "settings.toml").write_text(tomli_w.dumps(table))
    code, out, err = ubmd("run", "settings.toml", cwd=folder)
    assert code == 0, err
    return folder, out


def test_run_says_what_happens(printed: tuple[Path, str]) -> None:
    folder, out = printed
    lines = out.splitlines()
    assert lines[0] == "Dynamic training: at most 3 labels and 180 MD steps."
    (asked,) = [line for line in lines if "replica 0 (300 K), step 2: requests" in line]
    assert "> 0.02 eV/Å (absolute)" in asked
    history = RunFolder(folder / "run").read_history()
    row = history[1]["learnt"][0]
    assert f"label 1: predicted {row['error_before']:.3g}, true {row['true_before']:.3g} eV/Å" in out
    assert "Done with 3 labels after 2 rounds. The reference was asked for 3 structures (dynamic.labels)." in out
    assert "Model: run/model.pt" in out


def test_status_has_a_row_per_refit(printed: tuple[Path, str]) -> None:
    code, out, _ = ubmd("status", printed[0] / "run", cwd=printed[0])
    assert code == 0
    assert "finished. The reference was asked for 3 structures" in out
    assert "3 labels, 3 of at most 3 reference calculations" in out
    history = RunFolder(printed[0] / "run").read_history()
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("0 ", "1 "))]
    assert [row[:2] for row in rows] == [["0", "1"], ["1", "3"]]
    assert rows[1][-2] == f"{100 * history[1]['test']['relative']:.2f}"
    assert rows[1][-1] == str(history[1]["test"]["structures"])
    run = str(printed[0] / "run")
    both = ubmd("status", run, run, cwd=printed[0])[1]
    tail = f"finished  1  3 of 3  {history[1]['test']['force_rmse']:.3f} ({history[1]['test']['structures']})"
    assert [re.sub(" +", " ", line).strip() for line in both.splitlines() if run in line] == [
        re.sub(" +", " ", f"{run} {tail}")
    ] * 2


def test_info_of_a_dynamic_run_and_what_cannot_be_compared(
    printed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ubmd(*arguments: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return done.exit_code, done.stdout, done.stderr

    monkeypatch.chdir(printed[0])
    monkeypatch.setenv("COLUMNS", "150")
    code, out, err = ubmd("info", "run")
    assert code == 0, err
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert all(value in out for value in manifest["inputs"].values())
    assert re.search(r"dynamic\.labels +│ 3 +│ \d+", out)
    code, out, _ = ubmd("info", "run", "--json")
    assert (code, json.loads(out)) == (0, manifest)
    sentence = "run holds a dynamic run, which can't be compared with others: see 'ubmd report run' for its errors"
    code, out, err = ubmd("compare", "run", "run", "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"Error: {sentence}")
    code, out, err = ubmd("table", "run")
    assert code == 0
    assert err.startswith(f"Not counted: {sentence}")
    for command in ("info", "status", "report", "compare"):
        for path in (tmp_path, "settings.toml"):
            code, _, err = ubmd(command, path)
            assert (code, err.count("\n")) == (1, 1)
            assert ("manifest.json." if path == tmp_path or command != "info" else "not a ubmd model file") in err


def test_status_of_a_stopped_and_a_dead_run(printed: tuple[Path, str], tmp_path: Path) -> None:
    source = RunFolder(printed[0] / "run")
    folder = RunFolder(tmp_path)
    for name in ("settings.toml", "manifest.json"):
        (tmp_path / name).write_bytes((source.path / name).read_bytes())
    events = source.events.read_text().splitlines()[:12]
    folder.events.write_text("\n".join(events) + "\n")

    def text() -> str:
        console = Console(file=io.StringIO(), width=150)
        console.print(status(tmp_path))
        return console.file.getvalue()

    assert "stopped: its process" in text()
    with folder.events.open("a") as handle:
        handle.write(json.dumps({"event": "run_stopped", "why": "interrupted"}) + "\n")
    assert "stopped (interrupted); 'ubmd run' with the same settings resumes it" in text()


def test_progress_of_a_long_run_is_estimated(printed: tuple[Path, str]) -> None:
    settings = make_settings(printed[0] / "run", dynamic=settings_table(Path())["dynamic"] | {"steps": 1000})
    file = io.StringIO()
    lines = ProgressLines(Console(file=file, width=200), DynamicTimeline(settings), seconds_between=0.0)
    bars = ProgressBars(Console(file=io.StringIO(), force_terminal=True), DynamicTimeline(settings))
    for event in (
        {"event": "run_started", "process": 1, "labels_wanted": 7, "steps_wanted": 2000},
        {"event": "stage_started", "stage": "move", "round": 0},
        {"event": "md_steps", "round": 0, "steps": [10, 20], "limits": [30, 30]},
        {"event": "md_steps", "round": 0, "steps": [300, 200], "limits": [300, 300]},
    ):
        lines(event)
        bars(event)
    assert "[  0] MD: 500 of at most 2,000 steps" in file.getvalue()
    course = DynamicTimeline(settings)
    assert course.left() is None
    quiet = {"round": 0, "replica": 0, "temperature": 300.0, "end": 5, "ended": "segment", "reason": ""}
    assert describe_event(read_event({"event": "piece_done", **quiet})) == ""
    failed = quiet | {"ended": "failed", "reason": "It exploded."}
    assert describe_event(read_event({"event": "piece_done", **failed})).endswith("step 5: It exploded.")


def test_check_says_what_would_be_run(tmp_path: Path) -> None:
    path = write_inputs(tmp_path, tmp_path / "run")
    code, out, err = ubmd("check", path, cwd=tmp_path)
    assert code == 0, err
    assert "Si8, 8 atoms, periodic" in out
    assert "2 trajectories of 90 steps (0.18 ps) at 300, 900 K, unbiased; at most 7 reference calculations" in out
    assert "Space group Fd-3m (227), 48 operations, 2 atoms in the primitive cell." in out
    assert "Force constants of orders 2, 3:" in out
    assert not (tmp_path / "run").exists()


def test_a_rounded_crystal_runs_with_its_symmetry(tmp_path: Path) -> None:
    """Fractions of a hexagonal cell with 5 decimals: check and run say what they find; the box is made exact, too."""
    table = settings_table(tmp_path / "run")
    table["crystal"] |= {"structure": "rounded.extxyz"}
    table["start"] = {"count": 1, "repeat": [1, 1, 2]}
    table["dynamic"] |= {"labels": 2, "steps": 30}
    exact = make_supercell(bulk("Si", a=5.431), [[1, -1, 0], [0, 1, -1], [1, 1, 1]])
    exact = Atoms(exact.numbers, scaled_positions=exact.get_scaled_positions(), cell=exact.cell.cellpar(), pbc=True)
    scaled, cell = np.round(exact.get_scaled_positions(), 5), np.round(exact.cell[:], 4)
    write_structures(tmp_path / "rounded.extxyz", [Atoms(exact.numbers, scaled_positions=scaled, cell=cell, pbc=True)])
    del table["test"]
    (tmp_path / "settings.toml").write_text(tomli_w.dumps(table))
    code, out, err = ubmd("check", "settings.toml", cwd=tmp_path)
    assert code == 0, err
    assert "With crystal.tolerance = 0.001 (Å) it is Fd-3m (227), 48 operations, 2 atoms in the primitive cell" in out
    assert "Fd-3m" not in out.partition("With crystal.tolerance")[0]
    few = ["--set", "crystal.tolerance=1e-3"]
    code, out, err = ubmd("run", "settings.toml", *few, cwd=tmp_path)
    assert code == 0, err
    folder = RunFolder(tmp_path / "run")
    event = next(event for event in folder.read_events() if event["event"] == "basis")
    assert event["symmetry"][0] == "Space group Fd-3m (227), 48 operations, 2 atoms in the primitive cell."
    assert event["symmetry"][0] in out
    assert event["symmetry"][1].endswith("(crystal.tolerance = 0.001 Å).")
    box = read_structures(folder.dataset)[0]
    metric = box.cell[:] @ box.cell[:].T
    assert metric[0, 1] == pytest.approx(-metric[0, 0] / 2.0, rel=1e-12)  # hexagonal beyond the file's decimals
    code, _, err = ubmd("run", "settings.toml", cwd=tmp_path)
    assert "crystal.tolerance = 0.001, now it is 1e-05" in err


def test_older_runs_go_on_without_later_settings(printed: tuple[Path, str]) -> None:
    """Neither keys nor manifests of before know them."""
    settings = make_settings(printed[0] / "run")
    assert settings.crystal is not None
    old = settings.crystal.model_dump(mode="json", exclude={"structure", "tolerance", "pairs", "stable"})
    crystal = read_structures(settings.crystal.structure_file(printed[0]))[0]

    def key(tolerance: float) -> object:
        changed = settings.model_copy(update={"crystal": settings.crystal.model_copy(update={"tolerance": tolerance})})
        return ForceConstants(changed, crystal, printed[0] / "run" / "basis.npz", crystal).key()

    assert key(1e-5) == old
    assert key(1e-3) == old | {"tolerance": 1e-3}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"dynamic": {"trigger": {"rule": "absolute"}}}, "dynamic.trigger.threshold is missing"),
        (
            {"dynamic": {"trigger": {"threshold": 0.1}}},
            "threshold has no effect with rule = 'average', which takes factor",
        ),
        ({"dynamic": {"temperatures": [300.0, -1.0]}}, "temperatures must be greater than 0"),
        ({"dynamic": {"check_every": 7}}, "must be a multiple of dynamic.check_every = 7"),
        ({"dynamic": {"labels": 1}, "start": {"count": 2}}, "dynamic.labels = 1 is less than start.count = 2"),
        ({"start": {"repeat": [1, 0, 1]}}, "start.repeat needs three numbers of at least 1"),
        ({"model": {"cutoff": 4.0}}, r"\[model\] is for networks"),
        ({"uncertainty": {"kind": "distance"}}, "uncertainty.kind has no effect"),
        ({"crystal": None}, "'start.file' is missing"),
        ({"dynamics": {}}, "did you mean 'dynamic'"),
    ],
)
def test_mistakes_are_one_sentence(tables: dict, words: str) -> None:
    values = settings_table(Path("run"))
    for name, table in tables.items():
        if table is None:
            del values[name]
        else:
            values[name] = values.get(name, {}) | table
    with pytest.raises(SettingsError, match=words):
        from_table(DynamicRunSettings, values)


@pytest.mark.parametrize(
    ("words", "structure", "start"),
    [
        ("There is no file .*nothing.extxyz for crystal.structure", "nothing.extxyz", {}),
        ("start.file: there is no file .*box.extxyz", "silicon.extxyz", {"file": "box.extxyz"}),
    ],
)
def test_missing_files_are_named(words: str, structure: str, start: dict, tmp_path: Path) -> None:
    from ubmd.learning.dynamic.engine import run

    write_inputs(tmp_path, tmp_path / "run")
    crystal = settings_table(tmp_path)["crystal"] | {"structure": structure}
    with pytest.raises(SettingsError, match=words):
        run(make_settings(tmp_path / "run", crystal=crystal, start=start), tmp_path)


def test_triggers_of_the_settings_have_their_arguments() -> None:
    made = make_trigger(TriggerSettings(rule="average", maximum=0.2, wait=5, floor=0.5))
    assert made.settings() == {"maximum": 0.2, "factor": 3.0**0.5, "window": 1000, "wait": 5, "floor": 0.5}
    assert make_trigger(TriggerSettings(rule="absolute", threshold=0.3)).settings() == {"threshold": 0.3, "floor": 1.0}
    assert make_trigger(TriggerSettings(rule="history", history=4)).settings()["history"] == 4


def test_temperatures_are_dealt_out() -> None:
    dynamic = make_settings(Path("run"), dynamic={"temperatures": [300.0, 600.0], "replicas": 2}).dynamic
    assert [dynamic.temperature_of(r) for r in range(dynamic.trajectories)] == [300.0, 600.0, 300.0, 600.0]


def test_template_and_resolved_settings_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "dynamic.toml").write_text(dynamic_template())
    values = load_settings(tmp_path / "dynamic.toml", DynamicRunSettings)
    assert values.crystal is not None
    assert values.crystal.cutoffs == {2: 5.0, 3: 4.0, 4: 4.0}
    assert values.dynamic == DynamicSettings()
    assert schedule_of_file(tmp_path / "dynamic.toml") is DYNAMIC
    assert schedule_of_file(tmp_path / "nothing.toml") is LOOP
    code, out, err = ubmd("init", "--dynamic", tmp_path / "new.toml", cwd=tmp_path)
    assert code == 0, err
    assert tomllib.loads((tmp_path / "new.toml").read_text()) == tomllib.loads(dynamic_template("new.toml"))
    assert ubmd("init", "--short", "--dynamic", "brief.toml", cwd=tmp_path)[0] == 0
    assert load_settings(tmp_path / "brief.toml", DynamicRunSettings).crystal is not None
    code, out, _ = ubmd("schema", "dynamic", cwd=tmp_path)
    assert "eV/Å" in json.loads(out)["$defs"]["TriggerSettings"]["properties"]["maximum"]["description"]
