"""What the SLURM cases share: a cluster to talk to, and runs of the command line on its login node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import one_machine
import tomli_w
from one_machine import LOGIN, NODES, descendants
from processes import HELPERS
from system import cluster as atoms
from system import settings_table

from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.learning import RunFolder

PATIENCE = 300.0  # s
PYTHON = [sys.executable, "-c"]
UBMD = [*PYTHON, "from ubmd.cli.entry import main; main()"]
PROCESSES = {"processes": 2, "retries": 2}
# Parsl notices a lost node after its heartbeat's threshold: short, for short tests.
PARSL: dict[str, Any] = PROCESSES | {
    "executor": "parsl",
    "options": {
        "cores_per_worker": 1,
        "address": "127.0.0.1",
        "heartbeat_period": 2,
        "heartbeat_threshold": 10,
        "provider": {
            "name": "SlurmProvider",
            "launcher": "SrunLauncher",
            "partition": "standard",
            "nodes_per_block": 1,
            "init_blocks": 1,
            "min_blocks": 0,
            "max_blocks": 2,
            "walltime": "00:30:00",
        },
    },
}


def make_values(seconds: float, workers: dict[str, Any], **tables: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run whose labels take this long."""
    values = settings_table(Path())
    del values["test"]
    arguments = {"seconds": seconds}
    values["reference"] |= {"calculator": "slow_emt:SlowEMT", "arguments": arguments, "timeout": 120.0}
    values["workers"] = workers
    for name, table in tables.items():
        values[name] = values[name] | table
    return values


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


class Cluster:
    """A SLURM on this machine, from `start` to `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | one_machine.environment(folder)
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        self._process = subprocess.Popen(
            [sys.executable, one_machine.__file__, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is ours
        )
        said = self._process.stdout.readline().strip()
        assert said == "ready", said + self._process.stdout.read()

    def stop(self) -> None:
        """End all its processes."""
        self._process.stdin.close()
        self._process.wait(60.0)
        self._process.stdout.close()

    def node(self, verb: str, name: str) -> None:
        """'kill' or 'start' a node."""
        self._process.stdin.write(f"{verb} {name}\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline().strip()
        assert said == f"{verb} {name}", said

    def first(self, machine: str) -> int:
        """Id of the first process of a machine."""
        return int((self.folder / f"{machine}.pid").read_text())

    def on(self, machine: str, *command: str) -> list[str]:
        """The command line that runs a command on one of the machines, as the first of its session there."""
        return ["nsenter", "-t", str(self.first(machine)), "-m", "-p", "setsid", *command]

    def ask(self, *command: str) -> str:
        """What a command of SLURM prints.

        Raises:
            CalledProcessError: it fails.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()

    def jobs(self, *states: str) -> list[str]:
        """Ids of jobs in the queue, of these states ('R', 'PD', ...) or of any."""
        lines = [line.split() for line in self.ask("squeue", "-h", "-o", "%i %t").splitlines()]
        return [job for job, state in lines if not states or state in states]

    def clear(self) -> None:
        """Leave an empty queue, and nothing of a failed test on the machines."""
        self.ask("scancel", "-u", "root")
        assert wait_for(lambda: not self.jobs(), 60.0), self.ask("squeue")
        for process, _ in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for path in self._shared_memory():
            path.unlink()

    def workers(self) -> list[int]:
        """Processes on the nodes that run tasks."""
        return [process for process, name in self._processes() if "spawn_main" in name and not name.startswith(LOGIN)]

    def signal_step(self, job: str, number: int) -> None:
        """Send a signal to all processes of a job's step, if it is still there."""
        command = ["scancel", f"--signal={int(number)}", f"{job}.0"]
        subprocess.run(command, env=self.environment, capture_output=True, timeout=60, check=False)

    def left(self, keepers: bool = False, semaphores: bool = True) -> list[str]:
        """Processes on the machines that are not SLURM's, and files in their shared memory.

        Args:
            keepers: also those that look for jobs of an ended driver, which they do for a minute.
            semaphores: also those of Python, 32 bytes each. SIGKILL to all processes of a job leaves some on its node:
                that of Python which would remove them is among those processes.
        """
        found = [name for _, name in self._processes() if keepers or "keeper.py" not in name]
        memory = (path for path in self._shared_memory() if semaphores or not path.name.startswith("sem.mp-"))
        return found + list(map(str, memory))

    def _processes(self) -> Iterator[tuple[int, str]]:
        """(id, machine and command line) of those that are not SLURM's."""
        for machine in (LOGIN, *NODES):
            for process in descendants(self.first(machine)):
                with suppress(OSError):
                    command = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ").strip()
                    if command and not command.startswith(("slurmd -D", "sleep infinity")):
                        yield process, f"{machine}: {command}"

    def _shared_memory(self) -> Iterator[Path]:
        for machine in (LOGIN, *NODES):
            yield from Path(f"/proc/{self.first(machine)}/root/dev/shm").iterdir()


class Run:
    """A run of the command line on the login node, again and again."""

    def __init__(self, base: Path, values: dict[str, Any], cluster: Cluster) -> None:
        base.mkdir(parents=True, exist_ok=True)
        write_structures(base / "start.extxyz", [atoms()])
        self.base, self.cluster = base, cluster
        self.calls = base / "calls"
        self.settings = base / "settings.toml"
        self.folder = RunFolder(base / "run")
        self.set(values | {"run_dir": str(self.folder.path)})

    def set(self, values: dict[str, Any]) -> None:
        """Write these settings."""
        self.settings.write_text(tomli_w.dumps(values))

    def start(self, *command: str) -> Driver:
        """Start the driver, or another command."""
        paths = [str(HELPERS), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "CALLS": str(self.calls), "NO_COLOR": "1"}
        command = command or (*UBMD, "run", str(self.settings))
        return Driver(self.cluster, command, self.base, self.cluster.environment | environment)

    def finish(self) -> str:
        """Go on undisturbed to the end; returns what the driver said."""
        driver = self.start()
        code, said = driver.end()
        assert code == 0, said
        return said

    def count(self, what: str) -> int:
        """Calls of the calculator that began or ended ('begin', 'end')."""
        return sum(line.startswith(what) for line in self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def events(self, name: str) -> list[dict[str, Any]]:
        """Events of this name."""
        return [event for event in self.folder.read_events() if event["event"] == name]

    def wait_for_calls(self, count: int) -> None:
        """Wait until so many labels have begun."""
        assert wait_for(lambda: self.count("begin") >= count), (self.count("begin"), self.cluster.ask("squeue"))

    def in_stage(self, stage: str) -> bool:
        """Whether a stage has begun and has not ended."""
        return len([e for e in self.events("stage_started") if e["stage"] == stage]) > len(
            [e for e in self.events("stage_done") if e["stage"] == stage]
        )

    def rejected(self) -> list[str]:
        """Reasons."""
        return (
            [atoms.info["reason"] for atoms in read_structures(self.folder.rejected)]
            if (self.folder.rejected.exists())
            else []
        )

    def files(self) -> set[str]:
        """Names of the files in the folder of the run, relative to it; not the logs of Parsl."""
        found = (path.relative_to(self.folder.path) for path in self.folder.path.rglob("*") if path.is_file())
        return {str(path) for path in found if path.parts[0] != "parsl"}


class Driver:
    """A process on the login node, in a session of its own."""

    def __init__(self, cluster: Cluster, command: tuple[str, ...], folder: Path, environment: dict[str, str]) -> None:
        self._log = folder / f"driver_{time.monotonic_ns()}.log"
        with self._log.open("w") as log:
            self._outer = subprocess.Popen(
                cluster.on(LOGIN, *command),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_heed_signals,
            )
        assert wait_for(lambda: bool(descendants(self._outer.pid)) or self.ended(), 20.0)
        self.pid, *_ = descendants(self._outer.pid) or [0]

    def ended(self) -> bool:
        """Whether it has."""
        return self._outer.poll() is not None

    def said(self) -> str:
        """Its output and errors."""
        return self._log.read_text()

    def end(self, seconds: float = PATIENCE) -> tuple[int, str]:
        """Wait; returns its exit status and what it said."""
        try:
            return self._outer.wait(seconds), self.said()
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"The driver did not end:\n{self.said()}") from None

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to it, or to all of its process group."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        """With SIGKILL, from one moment to the next."""
        self.signal(signal.SIGKILL)
        self._outer.wait(60.0)


def _heed_signals() -> None:
    """Those that a shell ignores in what it starts in the background (Ctrl-C), or nohup."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
