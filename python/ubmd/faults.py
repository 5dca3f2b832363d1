"""Whose fault an error is: that of a calculation, or that of the machine it ran on."""

from __future__ import annotations

import errno
import os
import re
import signal
from subprocess import CalledProcessError

from ubmd.errors import MachineError, StorageError, one_line

WORKER = "UBMD_WORKER"
"""Environment variable of worker processes, and of what they start: '<process id of the worker>-<random text>'."""

# What a machine runs out of, or loses. Left out: what a calculation may well cause by itself (permissions, missing
# files, connections that were refused), and full disks, which have an error of their own.
_ERRNOS = {
    number
    for name in (
        *("EAGAIN", "ENOMEM", "ENFILE", "EMFILE", "ENOBUFS", "ENOLCK"),  # processes, memory, open files, locks
        *("EROFS", "EIO", "ENODEV", "EUCLEAN", "ETXTBSY"),  # disks
        *("ESTALE", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ENOTCONN"),  # network, FUSE
        *("ENOKEY", "EKEYEXPIRED", "EKEYREVOKED"),  # network disks with tickets
    )
    if (number := getattr(errno, name, None)) is not None
}

# Signals that people, batch systems and the kernel end processes with. SIGBUS comes from files in memory that find no
# room on the disk below. The others (SIGSEGV, SIGABRT, SIGFPE, SIGILL, ...) are crashes of the program itself.
_OUTSIDE = {
    getattr(signal, name)
    for name in (
        *("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"),
        *("SIGXCPU", "SIGXFSZ", "SIGPWR", "SIGBUS"),
    )
    if hasattr(signal, name)
}
_HINTS = {
    "SIGKILL": " (often: out of memory)",
    "SIGBUS": " (often: /dev/shm or a disk is full)",
    "SIGSEGV": " (a crash in compiled code)",
}
_ERRNO_HINTS = {errno.EAGAIN: "; often no more processes are allowed: ulimit -u", errno.EMFILE: "; ulimit -n"}
_NO_THREADS = "can't start new thread"  # Python's RuntimeError when the system allows no more
_NO_FOLDER = "No usable temporary directory"  # Python's FileNotFoundError when it can write to none
_ASE_PROGRAM = re.compile(r"with error code (-?\d+)")  # a CalculationFailed of ASE
_MPI_KILLED = re.compile(r"\(signal (\d+)\)|exited on signal (\d+)")  # mpiexec of MPICH, of Open MPI


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, quota or limit on file sizes: no fault of a structure either."""


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one that it came from, says that a disk, quota or file-size limit is full."""
    while error is not None:
        if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def machine_fault(error: BaseException | None) -> str:
    """Why an error, or one that it came from, is the machine's fault, without a full stop; empty if it is not."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        reason = _reason(error)
        if reason:
            return reason
        error = error.__cause__ or error.__context__
    return ""


def check_machine(error: BaseException) -> None:
    """MachineError instead of an error of a calculator that is the machine's fault."""
    fault = machine_fault(error)
    if fault:
        raise MachineError(f"The reference failed: {fault}.") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, MachineError):
        return one_line(error).rstrip(".")
    if isinstance(error, OSError) and (error.errno in _ERRNOS or _NO_FOLDER in str(error.strerror)):
        return (
            f"the machine ran out of a resource or lost one ({one_line(error)}{_ERRNO_HINTS.get(error.errno or 0, '')})"
        )
    if isinstance(error, RuntimeError) and _NO_THREADS in one_line(error):
        return "the system allows no more processes and threads (ulimit -u)"
    number = killed_from_outside(_exit_code(error))
    return f"the program was {killed_by(number)}" if number else ""


def _exit_code(error: BaseException) -> int:
    """Exit code of the program that an error is about, 0 if there is none."""
    if isinstance(error, CalledProcessError):
        return int(error.returncode or 0)
    if any(kind.__name__ == "CalculationFailed" for kind in type(error).__mro__):
        found = _ASE_PROGRAM.search(one_line(error))
        return int(found[1]) if found else 0
    return 0


def killed_from_outside(code: int) -> int:
    """The signal by which a process was ended from outside; 0 if it ended or crashed by itself.

    Args:
        code: as Python gives it (negative: a signal) or as a shell does (128 + the signal).
    """
    number = -code if code < 0 else code - 128
    return number if number in _OUTSIDE else 0


def killed_by(number: int) -> str:
    """'killed by SIGKILL (often: out of memory)' for the number of a signal."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"killed by {name}{_HINTS.get(name, '')}"


def killed_rank(output: str) -> int:
    """The signal by which, as ``mpiexec`` says in a program's output, a rank was ended from outside; else 0."""
    for found in _MPI_KILLED.finditer(output):
        number = killed_from_outside(-int(found[1] or found[2]))
        if number:
            return number
    return 0


def in_worker() -> bool:
    """Whether this process is one of our workers: in a session of its own, which no Ctrl-C in a terminal reaches."""
    return os.environ.get(WORKER, "").startswith(f"{os.getpid()}-")
