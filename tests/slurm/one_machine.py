"""A SLURM cluster on one machine: ``python one_machine.py FOLDER`` holds it until its input closes.

Everything is in FOLDER, which is removed in the end: configuration, key and socket of its own munge, state, logs. The
login node and the nodes n1 and n2 have processes, /dev/shm and temporary files of their own, as other machines would,
and share all else. Needs root; from Debian: slurmd slurmctld slurm-client munge.

Without FOLDER it only says, with status 1, why there can be no such cluster here.

Input: lines ``kill n1`` (the node loses power) and ``start n1``; each is answered by a line. All processes are
descendants of this program, also those that jobs leave behind, and end with it, however the one that uses it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

LOGIN, NODES = "login", ("n1", "n2")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "scontrol", "unshare")
_MARK = "UBMD_TEST_SLURM_PART=1"  # in the environment of all its programs
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_PATIENCE = 60.0  # s
_UP = ("idle", "mixed", "allocated", "completing")  # states of a node that answers
_ADMIN = "/usr/sbin:/sbin"  # not on everybody's PATH
_OWN = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")  # mounts and processes

# Ports on the loopback only. A short KillWait and SlurmdTimeout, for short tests: a lost node is down after 10 s.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={ctld}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=200000
KillWait=2
SlurmdTimeout=10
SlurmctldTimeout=10
InactiveLimit=0
MinJobAge=300
OverTimeLimit=0
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=standard Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=closed Nodes=n1 MaxTime=INFINITE State=INACTIVE
"""
# The shell stays, as the first process of the node: it takes notice of those that end without parents.
_NODE = """\
mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs -o mode=1777 tmpfs {folder}/tmp || exit 1
{program}
exit $?
"""


def why_not() -> str:
    """Why there can be no such cluster here, or empty text."""
    if os.geteuid() != 0:
        return "only root can start it"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{_ADMIN}") is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    known = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", os.environ.get("SLURM_CONF", "/nowhere"))
    if "SLURM_JOB_ID" in os.environ or any(Path(path).exists() for path in known):
        return "this machine belongs to a cluster"
    foreign = _foreign()
    if foreign:
        return f"{' and '.join(sorted(foreign))} run already"
    attempt = subprocess.run([*_OWN, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True, check=False)
    if attempt.returncode:
        return "this container may not mount file systems"
    return ""


def version() -> str:
    """Of SLURM."""
    program = shutil.which("slurmctld", path=f"{os.environ['PATH']}:{_ADMIN}")
    return subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]


def _foreign() -> set[str]:
    """Names of SLURM's programs that run here and are not of such a cluster as this one (two may run side by side)."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (entry / "comm").read_text().strip()
            if name in ("slurmctld", "slurmd") and _MARK.encode() not in (entry / "environ").read_bytes().split(b"\0"):
                found.add(name)
    return found


def descendants(process: int) -> list[int]:
    """Ids of the processes below this one that have not ended."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    level = [process]
    while level:
        level = [child for parent in level for child in parents.get(parent, [])]
        found += level
    return found


def environment(folder: Path) -> dict[str, str]:
    """What who uses the cluster adds to the environment."""
    return {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:{_ADMIN}",
        "TMPDIR": str(folder / "tmp"),  # each machine sees its own there
    }


class Machine:
    """The processes of the cluster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = os.environ | environment(folder)
        self._environment |= dict([_MARK.split("=")])
        self._machines: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything, and wait until the nodes are idle.

        Raises:
            TimeoutError: they don't become so.
        """
        self._write()
        own = (f"--{name}={self._folder}/munge.{name}" for name in ("key-file", "pid-file", "log-file", "seed-file"))
        self._run("munged", "--foreground", "--num-threads=2", f"--socket={self._folder}/munge.socket", *own)
        self._wait(lambda: self._asks("munge", "-n", "-S", f"{self._folder}/munge.socket"), "munged")
        self._run("slurmctld", "-D", "-c")
        self._start_machine(LOGIN, "sleep infinity")
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start a node, and wait until it is idle."""
        self._start_machine(node, f"slurmd -D -N {node}")
        self._wait(lambda: self._output("sinfo", "-h", "-N", "-p", "standard", "-n", node, "-o", "%T") in _UP, node)

    def _start_machine(self, name: str, program: str) -> None:
        """Processes, /dev/shm and temporary files of their own; FOLDER/NAME.pid says which process is the first."""
        script = _NODE.format(folder=self._folder, program=program)
        self._machines[name] = self._run(*_OWN, "bash", "-c", script)
        self._wait(lambda: bool(descendants(self._machines[name].pid)), name)
        first, *_ = descendants(self._machines[name].pid)
        (self._folder / f"{name}.pid").write_text(str(first))

    def kill_node(self, node: str) -> None:
        """End all processes of a node at once."""
        outer = self._machines.pop(node)
        processes = descendants(outer.pid)
        outer.kill()
        outer.wait()
        self._wait(lambda: not any(map(_is_there, processes)), f"the end of {node}")

    def stop(self) -> None:
        """End everything."""
        end = time.monotonic() + _PATIENCE
        while (found := descendants(os.getpid())) and time.monotonic() < end:
            for process in found:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    continue
            time.sleep(0.02)

    def _write(self) -> None:
        self._folder.chmod(0o711)  # munged wants its socket to be reachable
        for name in ("state", "tmp", *(f"spool.{node}" for node in NODES)):
            (self._folder / name).mkdir()
        (self._folder / "tmp").chmod(0o1777)
        key = self._folder / "munge.key-file"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = dict(zip(("ctld", *NODES), _free_ports(1 + len(NODES)), strict=True))
        host = socket.gethostname().split(".")[0]
        text = _CONFIGURATION.format(folder=self._folder, host=host, **ports)
        (self._folder / "slurm.conf").write_text(text)

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self._folder / "programs.log").open("ab")
        with log:
            return subprocess.Popen(
                command,
                env=self._environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,
            )

    def _output(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    def _asks(self, *command: str) -> bool:
        return bool(self._output(*command))

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"waited for {what}:\n{(self._folder / 'programs.log').read_text()}")
            time.sleep(0.2)


def _is_there(process: int) -> bool:
    """Whether a process is alive; takes notice of it if it was left to us and has ended."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, os.WNOHANG)
    return Path(f"/proc/{process}").exists()


def _free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens at."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(folder: Path) -> None:
    """Hold a cluster; says when it is ready, and what it cannot do."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what loses its parents becomes this process's child
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(0))
    machine = Machine(folder)
    try:
        machine.start()
        print("ready", flush=True)
        for line in sys.stdin:
            verb, node = line.split()
            {"kill": machine.kill_node, "start": machine.start_node}[verb](node)
            print(line.strip(), flush=True)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    except TimeoutError as error:
        print(error, flush=True)
    finally:
        machine.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]).resolve())
    else:
        sys.exit(why_not() or None)
