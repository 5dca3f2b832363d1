"""Ends whatever a process leaves behind: ``python keeper.py PID NAME=VALUE [session] [jobs=TEXT]``.

A reference may start programs, and those more programs (``mpiexec`` and its ranks, some in sessions of their own). When
the watched process ends, however that happens, all that inherited this environment variable are killed, and with
'session' all of its session, too; its shared memory is given back. With 'jobs' its jobs in SLURM whose names contain
the text are cancelled. Imports nothing of ubmd, so that it starts in milliseconds and stays small.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PATIENCE = 10.0  # s in which new processes may still appear
_QUIET = 3  # looks in a row that find nothing
_ANSWER = 60.0  # s that SLURM may take to answer
_TRIES = (0.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # s before each try to cancel jobs: SLURM may be down


def wait_for_end(worker: int) -> None:
    """Return when the process (the parent of this one) has ended."""
    if hasattr(os, "pidfd_open"):
        try:
            handle = os.pidfd_open(worker)
        except OSError:
            pass  # it has ended already, or the kernel is older than 5.3
        else:
            select.select([handle], [], [])
            return
    while os.getppid() == worker:
        time.sleep(0.2)


def left_behind(session: int | None, cookie: bytes) -> list[int]:
    """Processes of a session, or with a cookie in the environment that they were started with."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_bytes().rsplit(b")", 1)[1].split()  # a name may be any bytes
            mine = int(fields[3]) == session or cookie in (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue  # it has ended, or belongs to another user
        if mine and fields[0] != b"Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def end_all(session: int | None, cookie: bytes) -> None:
    """Kill until nothing is left."""
    end, quiet = time.monotonic() + _PATIENCE, 0
    while quiet < _QUIET and time.monotonic() < end:
        found = left_behind(session, cookie)
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue
        quiet = 0 if found else quiet + 1
        time.sleep(0.02)


def free_shared_memory(process: int) -> None:
    """Remove what MPICH keeps in memory for a process without MPI_Finalize: 1 MB, in the way of a later one of its id.

    That is every worker that has used LAMMPS: child processes of Python end without exit handlers. The name is that of
    a process that no ``mpiexec`` started (mpich 5.0).
    """
    for segment in Path("/dev/shm").glob(f"mpich_shm_{process:x}_*"):
        with contextlib.suppress(OSError):
            segment.unlink()


def cancel_jobs(part: str) -> bool:
    """Cancel this user's jobs in SLURM whose names contain a text; returns whether SLURM has answered."""
    if shutil.which("squeue") is None:
        return True
    listing = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%i %j"]
    try:
        lines = subprocess.run(listing, capture_output=True, text=True, check=True, timeout=_ANSWER).stdout.splitlines()
        jobs = [job for job, _, name in (line.partition(" ") for line in lines) if part in name]
        if jobs:
            subprocess.run(["scancel", *jobs], capture_output=True, check=True, timeout=_ANSWER)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def main(worker: int, cookie: str, session: bool, jobs: str) -> None:
    """Wait, then clean up."""
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a batch system sends SIGTERM to all first
        signal.signal(ending, signal.SIG_IGN)
    wait_for_end(worker)
    if session:
        with contextlib.suppress(OSError):
            os.killpg(worker, signal.SIGKILL)  # where there is no /proc, this is all
    end_all(worker if session else None, cookie.encode())
    free_shared_memory(worker)
    answers = 0
    for pause in _TRIES if jobs else ():
        time.sleep(pause)
        answers += cancel_jobs(jobs)
        if answers == 2:  # a job may have been submitted just before
            break


if __name__ == "__main__":
    given = dict(option.partition("=")[::2] for option in sys.argv[3:])
    main(int(sys.argv[1]), sys.argv[2], "session" in given, given.get("jobs", ""))
