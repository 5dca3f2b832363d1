"""What happens inside a worker process: how it begins, how it runs a task, what it restores afterwards.

A task may change its process in many ways (working directory, signals, descriptors, locale, ...), and calculators do.
The next task finds all that matters as the first one did; where that cannot be restored, the process is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import locale
import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TextIO

from ubmd.errors import LabelError, MachineError, StorageError, UbmdError, describe, one_line
from ubmd.faults import WORKER, in_worker, is_full, machine_fault

CLOSED = 211
"""Exit code of a worker whose task has closed the pipes to the driver."""

NO_PROCESS = 212
"""Exit code of a worker that may not start its keeper."""

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENMM_CPU_THREADS")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST_TRACEBACK = 20_000  # characters: the message at its end may be a whole output
_OWN_MODULES = ("ubmd.errors", "ubmd.learning.work.workers")  # of errors that the driver raises again
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]

Reply = tuple[Any, str, str, str]
"""(value, kind of error or empty text, reason, traceback): errors as text: foreign ones may not survive pickle."""


# ------------------------------------------------------------------------------------------ a task


def run_task(function: Callable[..., Any], *arguments: Any) -> tuple[Reply, bool]:
    """The reply of a call in a worker, and whether the process must not be used again."""
    _mend_streams()  # whoever read what this process prints may be gone: printing would fail
    reply = guarded(function, *arguments)
    mend_process()
    return reply, _state.worn


def mend_process() -> None:
    """Restore what a calculator has changed in this worker: after a task, and before its result is written.

    One that has closed the pipes to the driver ends the process: no answer can be trusted any more.
    """
    if _state.remembered:
        _state.mend()


def guarded(function: Callable[..., Any], *arguments: Any) -> Reply:
    """The reply of a call, whatever it raises."""
    process = os.getpid()
    try:
        reply: Reply = function(*arguments), "", "", ""
    except BaseException as error:  # also sys.exit, and what libraries end a process with
        reply = _failure(error)
    if os.getpid() != process:
        os._exit(0)  # a child that the task has forked came back
    return reply


def _failure(error: BaseException) -> Reply:
    kind, reason = _verdict(error)
    details = "" if isinstance(error, UbmdError) else traceback.format_exc()[:_LONGEST_TRACEBACK]
    return None, kind, reason, details


def _verdict(error: BaseException) -> tuple[str, str]:
    """(kind of error, one sentence): of the calculation, of the disk, or of the machine."""
    if isinstance(error, OSError) and is_full(error):
        return "StorageError", describe(error)
    if isinstance(error, MachineError):
        return "WorkersLost", one_line(error)
    if isinstance(error, KeyboardInterrupt) and not in_worker():  # a user's Ctrl-C
        return "WorkersLost", "The task was interrupted."
    if not isinstance(error, LabelError | StorageError):  # these say themselves what was at fault
        fault = machine_fault(error)
        if fault:
            return "WorkersLost", f"The task failed: {fault}."
    if not isinstance(error, UbmdError):
        return "TaskFailed", describe(error)
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ in _OWN_MODULES)
    return kind, one_line(error) or type(error).__name__


# ------------------------------------------------------------------------------------------ the process


def initialise(driver: int) -> None:
    """Tie this worker to its driver (a process id) and limit it to one thread, before torch or LAMMPS is imported."""
    _die_with(driver)
    # pebble's own handler is Python code, which waits for a busy LAMMPS to return.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # A Ctrl-C is for the driver. Not SIG_IGN: programs that a reference starts would inherit that.
    signal.signal(signal.SIGINT, _pass)
    signal.siginterrupt(signal.SIGINT, False)  # what waits in compiled code is not disturbed
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # the driver has blocked it for the start
    _take_along_what_it_starts()
    for name in _THREAD_VARIABLES:
        os.environ[name] = "1"
    if "torch" in sys.modules:  # a driver script that imports torch at its top
        sys.modules["torch"].set_num_threads(1)
    _state.remember()


def _pass(*_: object) -> None:
    """A signal handler."""


def _die_with(driver: int) -> None:
    """Ask the kernel to kill this process when the driver (its parent) ends, however that happens."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it ended before we could ask
        os._exit(1)


def _take_along_what_it_starts() -> None:
    """Let all programs that this process starts end with it."""
    try:
        start_keeper(WORKER, "session")
    except BlockingIOError:  # no more processes; Python would print a traceback
        os._exit(NO_PROCESS)
    os.setsid()


def start_keeper(name: str, *options: str) -> None:
    """Start the keeper, which outlives this process just long enough to kill what it has started.

    Args:
        name: environment variable of this process, and of what it starts from now on.
        options: see `ubmd.learning.work.keeper`.
    """
    value = f"{os.getpid()}-{secrets.token_hex(8)}"
    keeper = str(Path(__file__).with_name("keeper.py"))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", keeper, str(os.getpid()), f"{name}={value}", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # a pipe that the driver writes to must close with the driver
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    process.returncode = 0  # it outlives this process: Python would warn
    os.environ[name] = value
    os.environ["SPT_NOENV"] = "1"  # setproctitle, which Parsl uses, would overwrite it


# ------------------------------------------------------------------------------------------ what a task may change


class _State:
    """What a worker process was like when it began.

    Left alone are things that a calculator may set once, when it is imported, and rely on: variables of the
    environment, ``sys.path``, handlers of other signals, filters of warnings, numpy's errstate, random numbers.
    """

    def __init__(self) -> None:
        self.remembered = False
        self.worn = False  # whether the process must be replaced

    def remember(self) -> None:
        """Take the present state as the right one."""
        self._folder = _working_directory()
        self._umask = os.umask(0o022)
        os.umask(self._umask)
        self._locale = locale.setlocale(locale.LC_ALL)
        self._recursion = sys.getrecursionlimit()
        self._limits = {limit: resource.getrlimit(limit)[0] for limit in _LIMITS}
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self._streams = sys.stdout, sys.stderr
        self._descriptors = _open_files()
        self.remembered = True

    def mend(self) -> None:
        """See `mend_process`."""
        if any(_file(number) != file for number, file in self._descriptors.items()):
            os._exit(CLOSED)
        _mend_streams()
        self._streams = sys.stdout, sys.stderr = (_usable(self._streams[0]), _usable(self._streams[1]))
        os.umask(self._umask)
        if locale.setlocale(locale.LC_ALL) != self._locale:  # decimal commas
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_ALL, self._locale)
        sys.setrecursionlimit(max(self._recursion, sys.getrecursionlimit()))
        self._mend_signals()
        self._mend_limits()
        if _working_directory() != self._folder:
            self.worn = True  # the calculator may rely on its own folder: it finds the right one as at first
            with contextlib.suppress(OSError):
                os.chdir(self._folder)

    def _mend_limits(self) -> None:
        """Of memory, file sizes, open files, ...: only lower ones are in the way."""
        for limit, before in self._limits.items():
            now, highest = resource.getrlimit(limit)
            if now != before and now != resource.RLIM_INFINITY and (now < before or before == resource.RLIM_INFINITY):
                try:
                    resource.setrlimit(limit, (before, highest))
                except (OSError, ValueError):  # the task has lowered what only root may raise
                    self.worn = True

    def _mend_signals(self) -> None:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0.0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, _pass)
        signal.siginterrupt(signal.SIGINT, False)
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:  # exit codes of programs would be lost
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)


_state = _State()


def _working_directory() -> str:
    """Empty if it has been deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def _open_files() -> dict[int, tuple[int, int] | None]:
    """Descriptors of this process beyond the standard ones, and which files they are.

    Python itself may reopen that of multiprocessing's resource tracker.
    """
    try:
        numbers = [int(path.name) for path in Path("/dev/fd").iterdir()]
    except OSError:
        return {}
    files = {number: _file(number) for number in numbers if number > 2 and number != resource_tracker.getfd()}
    return {number: file for number, file in files.items() if file is not None}  # one was that of /dev/fd


def _file(descriptor: int) -> tuple[int, int] | None:
    """Device and inode of an open file; None if it is not open."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _mend_streams() -> None:
    """Redirect standard input, output and error to /dev/null if they are closed or can no longer be read.

    A file that is opened would get their numbers, and what compiled code prints would be written into it.
    """
    for number in (0, 1, 2):
        broken = select.POLLNVAL if number == 0 else select.POLLNVAL | select.POLLERR | select.POLLHUP
        look = select.poll()
        look.register(number, 0)
        if any(event & broken for _, event in look.poll(0)):
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)


def _usable(stream: TextIO) -> TextIO:
    """A stream, or one to /dev/null if a task has closed it."""
    return Path(os.devnull).open("w") if stream is not None and stream.closed else stream
