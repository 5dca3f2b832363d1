"""A loop that people leave alone: kills at random moments, a reference that fails and hangs, a disk that fills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from system import cluster, settings_table
from test_workers import descendants, is_alive, linux, wait_for

from ubmd.data.structures import read_structures, write_structures
from ubmd.learning import RunFolder

UBMD = [sys.executable, "-c", "from ubmd.cli.main import app; app()"]
HERE = str(Path(__file__).parent)


class Run:
    """A run of the command line, again and again."""

    def __init__(self, base: Path, run_dir: Path, **tables: dict[str, Any] | None) -> None:
        values = settings_table(run_dir)
        for name, table in tables.items():
            values[name] = values.get(name, {}) | (table or {})
            if table is None:
                del values[name]
        base.mkdir(parents=True, exist_ok=True)
        write_structures(base / "start.extxyz", [cluster()])
        (base / "settings.toml").write_text(tomli_w.dumps(values))
        self.base = base
        self.folder = RunFolder(run_dir)
        self.mark = f"{os.getpid()}-{base.name}-{time.monotonic_ns()}"  # in the environment of all its processes

    def start(self, largest_file: int | None = None) -> subprocess.Popen[str]:
        """The driver; ``largest_file``: it and its workers cannot write larger ones, bytes."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SOAK": self.mark, "NO_COLOR": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([HERE, environment.get("PYTHONPATH", "")])
        command = [*UBMD, "run", str(self.base / "settings.toml")]
        if largest_file is not None:
            command = ["prlimit", f"--fsize={largest_file}", *command]
        return subprocess.Popen(
            command,
            cwd=self.base,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> None:
        """Go on undisturbed to the end."""
        driver = self.start()
        _, errors = driver.communicate(timeout=900)
        assert driver.returncode == 0, errors

    def orphans(self) -> list[str]:
        """Command lines of the run's processes that are alive."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"SOAK={self.mark}".encode() in (entry / "environ").read_bytes() and is_alive(int(entry.name)):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


def check_whole(run: Run, labels: int) -> None:
    """As many labels as wanted, each once; nothing of the run is alive."""
    dataset = read_structures(run.folder.dataset, labelled=True)
    assert [atoms.info["label"] for atoms in dataset] == list(range(labels))
    assert len({atoms.positions.tobytes() for atoms in dataset}) == labels
    events = run.folder.read_events()
    labelled = Counter((e["iteration"], e["index"]) for e in events if e["event"] in ("label_done", "label_rejected"))
    assert set(labelled.values()) == {1}, labelled
    appended = Counter(e["label"] for e in events if e["event"] == "label_appended")
    assert set(appended.values()) == {1}
    assert wait_for(lambda: not run.orphans()), run.orphans()


# ------------------------------------------------------------------------------------------ a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all space that is left; returns the file to remove."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as handle:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    handle.write(b"x" * size)
            except OSError:
                continue
    return ballast


FEW = {"loop": {"labels": 6, "warm_epochs": 4}, "training": {"epochs": 6}, "test": {"sampling": {"frames": 2}}}


def check_sentence(driver: subprocess.Popen[str], folder: Path) -> None:
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1, errors
    said = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, errors
    assert said[0].startswith(f"Error: There is no space left for {folder}")
    assert "Traceback" not in errors


@linux
@pytest.mark.parametrize("moment", ["labels", pytest.param("train", marks=pytest.mark.slow), "md"])
def test_a_full_disk_ends_with_a_sentence_and_goes_on_with_space(small_disk: Path, tmp_path: Path, moment: str) -> None:
    run = Run(tmp_path / "base", small_disk / "run", **FEW)
    driver = run.start()
    signs = {"labels": "start/candidate_000.extxyz", "train": "iterations/iter_000/train", "md": "iterations/*/starts"}
    assert wait_for(lambda: bool(list(run.folder.path.glob(signs[moment]))), 120.0)
    ballast = fill(small_disk)
    check_sentence(driver, run.folder.path)
    check_sentence(run.start(), run.folder.path)  # still full
    ballast.unlink()
    run.finish()
    check_whole(run, 6)
    assert not (run.folder.path / "rejected.extxyz").exists()


@linux
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit sets limits of processes")
def test_a_limit_on_file_sizes_ends_with_a_sentence(tmp_path: Path) -> None:
    run = Run(tmp_path / "base", tmp_path / "run", **FEW)
    check_sentence(run.start(largest_file=8000), run.folder.path)
    run.finish()
    check_whole(run, 6)


# ------------------------------------------------------------------------------------------ soak

SOAKED: dict[str, Any] = {
    "reference": {"calculator": "unkind:FlakyEMT", "timeout": 12.0, "force_limit": 1000.0},
    "start": {"count": 6},
    "loop": {"warm_epochs": 6, "threshold": 1000.0},
    "selection": {"batch": 3},
    "workers": {"processes": 2, "retries": 50},
    "test": None,  # reference MD would meet a failure
}


def workers_of(driver: subprocess.Popen[str]) -> list[int]:
    """Worker processes, with or without a task."""
    found = []
    for process in descendants(driver.pid):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def soak(tmp_path: Path, disk: Path | None, labels: int, blows: int, seed: int) -> None:
    """The same data set as an undisturbed run, after this many blows at random moments."""
    tables = SOAKED | {"loop": SOAKED["loop"] | {"labels": labels}}
    calm = Run(tmp_path / "calm", tmp_path / "calm" / "run", **tables)
    calm.finish()
    run = Run(tmp_path / "soaked", (disk or tmp_path / "soaked") / "run", **tables)
    rng = random.Random(seed)
    kinds = ["driver", "worker", "worker", "disk" if disk is not None else "driver"]
    plan = [kind for _ in range(blows // len(kinds)) for kind in rng.sample(kinds, len(kinds))]
    dealt: Counter[str] = Counter()
    driver = run.start()
    for blow in plan:
        # On a busy machine it takes a while until there is something to hit.
        wait_for(lambda: bool(workers_of(driver)) or driver.poll() is not None, 120.0)  # noqa: B023
        time.sleep(rng.uniform(0.0, 4.0))
        if driver.poll() is not None:
            break  # it has come to its end
        if blow == "worker" and not workers_of(driver):
            blow = "driver"
        dealt[blow] += 1
        if blow == "worker":
            with suppress(OSError):
                os.kill(rng.choice(workers_of(driver)), signal.SIGKILL)
            continue
        if blow == "driver":
            driver.kill()
            driver.communicate()
        else:
            ballast = fill(disk)
            check_sentence(driver, run.folder.path)
            ballast.unlink()
        assert wait_for(lambda: not run.orphans()), (blow, run.orphans())
        driver = run.start()
    _, errors = driver.communicate(timeout=900)
    assert driver.returncode == 0, errors
    check_whole(run, labels)
    assert dealt["driver"] > 0, dealt
    assert dealt["worker"] > 0, dealt
    assert run.folder.dataset.read_bytes() == calm.folder.dataset.read_bytes()
    rejected = [atoms.info["reason"] for atoms in read_structures(run.folder.rejected)]
    assert any("12 s" in reason for reason in rejected)
    assert any("The wind has changed." in reason for reason in rejected)


@linux
@pytest.mark.slow
@pytest.mark.slow_ci
def test_soak(small_disk: Path, tmp_path: Path) -> None:
    soak(tmp_path, small_disk, labels=15, blows=12, seed=1)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_long_soak(small_disk: Path, tmp_path: Path, seed: int) -> None:
    soak(tmp_path, small_disk, labels=30, blows=60, seed=seed)
