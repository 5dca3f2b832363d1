"""Folders that cannot be written, file systems without locks, damaged files, and Ctrl-C: one sentence each."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from processes import wait_for
from system import cluster, settings_table
from typer.testing import CliRunner

from ubmd.cli.main import app
from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import SettingsError
from ubmd.runs.folder import RunFolder


def write_settings(folder: Path, run_dir: Path) -> Path:
    """Settings of the smallest run: one iteration with MD, one without."""
    write_structures(folder / "start.extxyz", [cluster()])
    settings = settings_table(run_dir) | {"loop": {"labels": 5, "threshold": 1000.0}}
    settings["md"] |= {"replicas": 1}
    settings["selection"] = {"batch": 1}
    settings["training"]["epochs"] = 2
    del settings["test"]
    (folder / "settings.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    return folder / "settings.toml"


def said_by(*arguments: str | Path) -> tuple[int, str]:
    """(status, output in one line) of a command."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


def take_lock(folder: RunFolder) -> None:
    with folder.locked():
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with settings and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    code, said = said_by("run", write_settings(folder, folder / "run"))
    assert code == 0, said
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage, with settings beside it."""
    shutil.copytree(finished / "run", tmp_path / "run")
    write_settings(tmp_path, tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------ not to be written


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody can write to, also not root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("below", ["", "sub/run"])
def test_a_file_in_the_way_of_the_run(tmp_path: Path, command: str, below: str) -> None:
    (tmp_path / "taken").write_text("mine")
    target = tmp_path / "taken" / below
    code, said = said_by(command, write_settings(tmp_path, target))
    assert (code, said) == (
        1,
        f"Error: run_dir = {target} cannot be made or written ({tmp_path / 'taken'} is a file); set another run_dir.",
    )
    assert (tmp_path / "taken").read_text() == "mine"


def test_folders_that_only_the_attempt_shows(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SettingsError, match=r"taken/run cannot be made or written \(there is a file in the way\)"):
        take_lock(RunFolder(tmp_path / "taken" / "run"))
    with pytest.raises(SettingsError, match=r"run_dir = /proc/run cannot be made or written \("):
        take_lock(RunFolder(Path("/proc/run")))


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_read_only_file_system(tmp_path: Path, read_only: Path, command: str) -> None:
    code, said = said_by(command, write_settings(tmp_path, read_only / "run"))
    assert (code, f"({read_only} is read-only); set another run_dir." in said) == (1, True), said
    with pytest.raises(SettingsError, match=r"cannot be made or written \(read-only file system\)"):
        take_lock(RunFolder(read_only))


@pytest.mark.parametrize("command", ["run", "check"])
def test_names_that_are_no_text(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / os.fsdecode(b"latin-\xe4")
    odd.mkdir()
    settings = write_settings(tmp_path, Path("run"))
    for folder, override in ((tmp_path, f"run_dir={odd}/run"), (odd, "run_dir=run")):
        monkeypatch.chdir(folder)
        code, said = said_by(command, settings, "--set", override)
        assert (code, "cannot be read as text in this locale; rename the folder" in said) == (1, True), said
        assert f"run_dir: the name of {tmp_path}/latin-\ufffd/run" in said


def test_a_locale_without_our_letters(tmp_path: Path) -> None:
    code = "from ubmd.cli.entry import main; main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code, "check", str(write_settings(tmp_path, tmp_path / "run"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "largest uncertainty" in done.stdout


def test_the_command_is_the_one_that_is_tested_here() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["ubmd"] == "ubmd.cli.entry:main"


def test_results_that_could_not_be_written(finished: Path, tmp_path: Path) -> None:
    data = finished / "run" / "dataset.extxyz"
    (tmp_path / "taken").write_text("mine")
    for name in ("model.pt", "log.csv"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "train.toml").write_text(f'training_file = "{data}"\n[training]\nepochs = 1\n')

    def train(folder: Path) -> tuple[int, str]:
        return said_by("train", tmp_path / "train.toml", "--set", f"output_dir={folder}")

    taken = tmp_path / "taken"
    why = "cannot be made or written (there is a file in the way); name another one."
    assert train(taken) == (1, f"Error: output_dir: {taken} {why}")
    assert train(taken / "deeper") == (1, f"Error: output_dir: {taken / 'deeper'} {why}")
    assert train(tmp_path / "out") == (
        1,
        f"Error: output_dir: a file {tmp_path / 'out' / 'model.pt'} is to be written, but there is a folder of that "
        "name; move it away.",
    )
    (tmp_path / "out" / "model.pt").rmdir()
    assert "log.csv is to be written, but there is a folder" in train(tmp_path / "out")[1]
    weights = next((finished / "run").rglob("weights.pt"))
    assert said_by("export", weights, data, data, "-o", taken / "model.pt") == (1, f"Error: --out: {taken} {why}")
    assert said_by("compare", finished / "run", "--out", taken) == (1, f"Error: --out: {taken} {why}")
    assert said_by("init", "/proc/settings.toml")[1].startswith("Error: FILE: /proc cannot be made or written (")


def test_a_report_with_a_file_in_its_way(run: Path) -> None:
    shutil.rmtree(run / "report")
    (run / "report").write_text("mine")
    code, said = said_by("report", run)
    assert (code, "(there is a file in the way)" in said) == (1, True), said


# ------------------------------------------------------------------------------------------ locks


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_the_note_of_a_living_process_counts(without_locks: None, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.locked():
        assert folder.is_locked()
        with pytest.raises(SettingsError, match="Another process is working on"):
            take_lock(RunFolder(tmp_path))
        note = (tmp_path / ".lock").read_text()
    assert not folder.is_locked()
    host, process, start = note.split()
    for gone in (f"{host} {process} {int(start) - 1}", f"{host} 4194999 1", f"elsewhere {process} {start}", "", "x"):
        (tmp_path / ".lock").write_text(gone)
        assert not folder.is_locked()
        with folder.locked():
            assert (tmp_path / ".lock").read_text() == note


def test_locks_keep_others_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.is_locked()
    with folder.locked():
        assert folder.is_locked()
        with pytest.raises(SettingsError, match="Another process is working on"):
            take_lock(RunFolder(tmp_path))
    assert not folder.is_locked()


# ------------------------------------------------------------------------------------------ damaged files

DAMAGES = [b"", b"{", b"[]", b"3", b'{"format": 2}', b"\xff\xfe\x00", b'{"format": 2, "settings": {}, "phases": 1}']


@pytest.mark.parametrize("content", [*DAMAGES, None], ids=str)
def test_a_damaged_manifest(run: Path, content: bytes | None) -> None:
    manifest = run / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-40] if content is None else content)
    sentence = (
        f"Error: {manifest} is damaged, and without it the run cannot be resumed: restore it from a copy, or set "
        "another run_dir and start from the labels in dataset.extxyz, which are kept."
    )
    for command in (["run", run.parent / "settings.toml"], ["status", run], ["info", run], ["report", run]):
        assert said_by(*command) == (1, sentence)
    assert said_by("compare", run, run, "--out", run.parent / "out")[0] == 1


def test_a_manifest_of_another_version(run: Path) -> None:
    (run / "manifest.json").write_text(json.dumps({"format": 99, "ubmd": "9.0", "settings": {}}))
    code, said = said_by("run", run.parent / "settings.toml")
    assert (code, "was made by another version of ubmd (9.0)" in said) == (1, True), said


WITHIN = b'[{"iteration": 0, "labels": 4, "md_steps": 8, "valid": 5}]'


@pytest.mark.parametrize(
    "content",
    [b"", b"[{", b"{}", b"[1]", b'[{"iteration": 0, "labels": "4"}]', WITHIN, b"\xff\xfe"],
    ids=str,
)
def test_a_damaged_history_is_made_again(run: Path, content: bytes) -> None:
    before, labels = json.loads((run / "history.json").read_text()), (run / "dataset.extxyz").read_text()
    (run / "history.json").write_bytes(content)
    for command in ("status", "report"):
        code, said = said_by(command, run)
        assert (code, "history.json is damaged; 'ubmd run' recreates it" in said) == (1, True), said
    begun = len(RunFolder(run).read_events())
    code, said = said_by("run", run.parent / "settings.toml")
    assert code == 0, said
    assert json.loads((run / "history.json").read_text()) == before
    assert (run / "dataset.extxyz").read_text() == labels
    events = RunFolder(run).read_events()[begun:]
    assert not [e for e in events if e["event"] == "stage_started" and e["stage"] in ("train", "md", "label")], events
    assert any(path.name.startswith("history.json") for path in (run / "aside").iterdir())


@pytest.mark.parametrize(("command", "name"), [("status", "events.jsonl"), ("run", "dataset.extxyz")])
def test_what_the_system_refuses_is_one_sentence(run: Path, command: str, name: str) -> None:
    """As for files that may not be read (root may read all), folders that vanish and full disks."""
    (run / name).unlink()
    (run / name).mkdir()
    code, said = said_by(command, run.parent / "settings.toml" if command == "run" else run)
    assert code == 1, said
    assert f"{name}: is a directory; fix that and rerun the same command." in said


def test_damaged_events(run: Path) -> None:
    whole = RunFolder(run).read_events()
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    stamp = b'"time": "2026-01-01T00:00:00.000+00:00"'
    bad = [b"\xff\xfe\n", b"3\n", b"[]\n", b"null\n", b'{"time": 5, "event": "run_done"}\n']
    bad += [b'{"time": "2026-01-01T00:00:00", "event": "run_done"}\n', b'{"event": 5, ' + stamp + b"}\n", b"[" * 9999]
    half = [b'{"event": "%s", %s}\n' % (name, stamp) for name in (b"stage_started", b"label_appended", b"stage_done")]
    (run / "events.jsonl").write_bytes(b"".join([*lines, *bad, b"\n", *half]))
    assert RunFolder(run).read_events()[: len(whole)] == whole
    assert len(RunFolder(run).read_events()) == len(whole) + 3
    code, said = said_by("status", run)
    assert (code, "finished" in said, "5 of 5 labels" in said) == (0, True, True), said
    assert said_by("report", run)[0] == 0
    assert said_by("run", run.parent / "settings.toml")[0] == 0


@pytest.mark.parametrize("content", [b"", b"seed = ", b"seed = 'x'", b"\xff"], ids=str)
def test_damaged_settings_of_a_run(run: Path, content: bytes) -> None:
    (run / "settings.toml").write_bytes(content)
    for command in ("status", "info", "report"):
        code, said = said_by(command, run)
        assert (code, f"Error: {run / 'settings.toml'} cannot be read (" in said) == (1, True), said
    assert said_by("run", run.parent / "settings.toml")[0] == 0
    assert said_by("status", run)[0] == 0


# ------------------------------------------------------------------------------------------ Ctrl-C and other signals


@pytest.mark.parametrize("delay", [0.1, 0.3, 0.6, 1.0, 2.0, 3.5])
def test_ctrl_c_is_one_sentence_whenever_it_comes(tmp_path: Path, delay: float) -> None:
    """As in a terminal: the whole group of processes gets it."""
    settings = write_settings(tmp_path, tmp_path / "run")
    code = f"import sys; sys.argv = ['ubmd', 'run', {str(settings)!r}]; from ubmd.cli.entry import main\n"
    code += "print('here', flush=True); main()"
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )
    assert driver.stdout is not None
    assert driver.stdout.readline() == "here\n"
    time.sleep(delay)
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert "Traceback" not in out + err, err
    assert (driver.returncode, err.splitlines()[-1:]) in (
        (130, ["Interrupted; rerun the same command to resume."]),
        (0, err.splitlines()[-1:]),
    )
    if driver.returncode == 0:
        assert len(read_structures(tmp_path / "run" / "dataset.extxyz")) == 5


MAIN = [sys.executable, "-c", "from ubmd.cli.entry import main; main()"]


def started(run_dir: Path) -> bool:
    events = run_dir / "events.jsonl"
    return events.exists() and '"run_started"' in events.read_text()


def why_stopped(run_dir: Path) -> list[str]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event["why"] for event in events if event["event"] == "run_stopped"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_end_a_run_like_ctrl_c_and_once_is_enough(tmp_path: Path, name: str) -> None:
    settings, number = write_settings(tmp_path, tmp_path / "run"), signal.Signals[name]
    driver = subprocess.Popen([*MAIN, "run", settings], stderr=subprocess.PIPE, text=True)
    assert wait_for(lambda: started(tmp_path / "run"), 120.0)
    driver.send_signal(number)
    while driver.poll() is None:  # more of them while it cleans up
        time.sleep(0.01)
        driver.send_signal(number)
    _, said = driver.communicate()
    assert said == "Interrupted; rerun the same command to resume.\n"
    assert driver.returncode == 128 + number
    assert why_stopped(tmp_path / "run") == [f"ended by {name}"]


@pytest.mark.parametrize("nohup", [True, False])
def test_the_terminal_of_a_run_vanishes(tmp_path: Path, nohup: bool) -> None:
    """Started with nohup, or by a script in the background, a run goes on; otherwise it ends."""
    settings = write_settings(tmp_path, tmp_path / "run")
    ours, its = pty.openpty()

    def prepare() -> None:
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)  # the terminal that the process belongs to
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if nohup else signal.SIG_DFL)

    driver = subprocess.Popen(
        [*MAIN, "run", settings], stdin=its, stdout=its, stderr=its, start_new_session=True, preexec_fn=prepare
    )
    os.close(its)
    shown = b""
    while b"Run to 5 labels." not in shown:
        shown += os.read(ours, 10_000)
    if nohup:
        driver.send_signal(signal.SIGINT)
    os.close(ours)
    assert driver.wait(timeout=120) == (0 if nohup else 129)
    assert why_stopped(tmp_path / "run") == ([] if nohup else ["ended by SIGHUP"])
    if nohup:
        assert len(read_structures(tmp_path / "run" / "dataset.extxyz")) == 5
