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
from processes import HELPERS, descendants, is_alive, linux, wait_for
from system import cluster, settings_table

from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.learning import RunFolder

# Whether a process may have a folder of its own as /dev/shm.
OWN_MEMORY = shutil.which("unshare") is not None and not subprocess.call(
    ["unshare", "-m", "mount", "--bind", "/tmp", "/dev/shm"], stderr=subprocess.DEVNULL
)
UBMD = [sys.executable, "-c", "from ubmd.cli.entry import main; main()"]


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
        self.memory = base / "memory"
        self.memory.mkdir()
        self.folder = RunFolder(run_dir)
        self.mark = f"{os.getpid()}-{base.name}-{time.monotonic_ns()}"  # in the environment of all its processes

    def start(self, largest_file: int | None = None) -> subprocess.Popen[str]:
        """The driver; ``largest_file``: it and its workers cannot write larger ones, bytes."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SOAK": self.mark, "NO_COLOR": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(HELPERS), environment.get("PYTHONPATH", "")])
        command = [*UBMD, "run", str(self.base / "settings.toml")]
        if largest_file is not None:
            command = ["prlimit", f"--fsize={largest_file}", *command]
        if OWN_MEMORY:
            command = [
                "unshare",
                "-m",
                "sh",
                "-c",
                'mount --bind "$0" /dev/shm && exec "$@"',
                str(self.memory),
                *command,
            ]
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
@pytest.mark.parametrize(
    "moment", ["labels", *(pytest.param(name, marks=pytest.mark.slow) for name in ("train", "md"))]
)
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


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGSTOP)
TARGETS = ("driver", "driver's group", "worker", "worker's group")
Blow = tuple[str, signal.Signals | None]
"""(what is hit, with which signal); the disk is filled instead"""


def workers_of(driver: subprocess.Popen[str]) -> list[int]:
    """Worker processes, with or without a task."""
    found = []
    for process in descendants(driver.pid):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


def plan_blows(count: int, disks: int, rng: random.Random) -> list[Blow]:
    """Blows of all kinds in random order, all but ``disks`` of them signals: as evenly as their number allows."""
    every: list[Blow] = [(target, number) for target in TARGETS for number in SIGNALS]
    signals = [blow for _ in range(count // len(every) + 1) for blow in rng.sample(every, len(every))]
    plan = signals[: count - disks] + [("disk", None)] * disks
    return rng.sample(plan, len(plan))


def send(process: int, number: signal.Signals, group: bool, rng: random.Random) -> None:
    """A signal to a process or its group; one that stops it is followed by one that lets it go on."""
    deliver = os.killpg if group else os.kill
    with suppress(OSError):
        deliver(process, number)
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(1.0, 5.0))
            deliver(process, signal.SIGCONT)


def check_interrupted(driver: subprocess.Popen[str], number: signal.Signals) -> None:
    """The driver ends as after Ctrl-C, unless the signal came before it could listen."""
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode in (128 + number, -number, 0), errors
    if driver.returncode == 128 + number:
        assert errors.splitlines()[-1] == "Interrupted; rerun the same command to resume."
    assert "Traceback" not in errors


def strike(run: Run, driver: subprocess.Popen[str], blow: Blow, disk: Path | None, rng: random.Random) -> None:
    """One blow; afterwards the driver has ended, or goes on."""
    target, number = blow
    if number is None:
        assert disk is not None
        ballast = fill(disk)
        check_sentence(driver, run.folder.path)
        ballast.unlink()
        return
    process = driver.pid if target.startswith("driver") else rng.choice(workers_of(driver))
    send(process, number, target.endswith("group"), rng)
    if target.startswith("driver") and number != signal.SIGSTOP:
        if number == signal.SIGKILL:
            driver.communicate()
        else:
            check_interrupted(driver, number)


def litter(run: Run) -> list[str]:
    """What no finished run leaves in its folder."""
    names = (".wanted-*", "*.tmp", "*.tmp-*", "*.attempt", "*.progress", "*.task", "*.ended", "postponed_*")
    return sorted(str(path.relative_to(run.folder.path)) for name in names for path in run.folder.path.rglob(name))


def soak(tmp_path: Path, disk: Path | None, labels: int, blows: int, seed: int) -> None:
    """The same data set as an undisturbed run, after this many blows at random moments."""
    tables = SOAKED | {"loop": SOAKED["loop"] | {"labels": labels}}
    calm = Run(tmp_path / "calm", tmp_path / "calm" / "run", **tables)
    calm.finish()
    run = Run(tmp_path / "soaked", (disk or tmp_path / "soaked") / "run", **tables)
    rng = random.Random(seed)
    dealt: Counter[str] = Counter()
    driver = run.start()
    for blow in plan_blows(blows, blows // 6 if disk is not None else 0, rng):
        # On a busy machine it takes a while until there is something to hit.
        wait_for(lambda: bool(workers_of(driver)) or driver.poll() is not None, 120.0)  # noqa: B023
        time.sleep(rng.uniform(0.0, 4.0))
        if driver.poll() is not None:
            break  # it has come to its end
        if blow[0].startswith("worker") and not workers_of(driver):
            blow = "driver", blow[1]
        dealt[blow[0]] += 1
        strike(run, driver, blow, disk, rng)
        if driver.poll() is not None:
            assert wait_for(lambda: not run.orphans()), (blow, run.orphans())
            driver = run.start()
    _, errors = driver.communicate(timeout=900)
    assert driver.returncode == 0, errors
    check_whole(run, labels)
    assert dealt["driver"] > 0, dealt
    assert dealt["worker"] > 0, dealt
    assert run.folder.dataset.read_bytes() == calm.folder.dataset.read_bytes()
    assert run.folder.rejected.read_bytes() == calm.folder.rejected.read_bytes()
    assert litter(run) == []
    assert wait_for(lambda: not list(run.memory.iterdir())), list(run.memory.iterdir())
    rejected = [atoms.info["reason"] for atoms in read_structures(run.folder.rejected)]
    assert any("12 s" in reason for reason in rejected)
    assert any("The wind has changed." in reason for reason in rejected)


@linux
@pytest.mark.slow
@pytest.mark.slow_ci
def test_soak(small_disk: Path, tmp_path: Path) -> None:
    soak(tmp_path, small_disk, labels=15, blows=14, seed=1)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_long_soak(small_disk: Path, tmp_path: Path, seed: int) -> None:
    soak(tmp_path, small_disk, labels=30, blows=50, seed=seed)
