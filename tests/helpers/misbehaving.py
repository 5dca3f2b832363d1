"""An ASE calculator that misbehaves in one of many ways, once, and expects a process in order afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import locale
import mmap
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from ase import Atoms
from ase.calculators.emt import EMT
from unkind import Unpicklable

FAR = 100.0  # Å; structures with their first atom beyond this x are those to misbehave for


class Misbehaving(EMT):
    """EMT; for a structure far away it does what `DEEDS` has under ``kind``, for the next ones what `CHECKS` has."""

    def __init__(self, kind: str, pids: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.pids = pids
        self.child = 0
        self.begun = settings_of_process()

    def calculate(self, atoms: Atoms, *args: Any, **kwargs: Any) -> None:
        if atoms.positions[0, 0] < FAR:
            CHECKS.get(self.kind, lambda _: None)(self)
            super().calculate(atoms, *args, **kwargs)
            return
        if self.kind in RESULTS:
            super().calculate(atoms, *args, **kwargs)
            RESULTS[self.kind](self.results)
            return
        DEEDS[self.kind](self, atoms)
        super().calculate(atoms, *args, **kwargs)

    def note(self, *processes: int) -> None:
        """Remember processes that nobody may find later."""
        with Path(self.pids).open("a") as file:
            file.writelines(f"{process}\n" for process in processes)


class Foreign(BaseException):
    """An error of a library that is no Exception."""


class Talkative(Exception):
    """An error that ends the process when it is shown."""

    def __str__(self) -> str:
        sys.exit("never ask")


def raises(error: BaseException) -> Callable[..., NoReturn]:
    def deed(*_: object) -> NoReturn:
        raise error

    return deed


def sends(number: int) -> Callable[..., None]:
    def deed(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.1)

    return deed


def runs(*words: str) -> Callable[..., None]:
    def deed(*_: object) -> None:
        subprocess.run(words, check=True)

    return deed


def calls(function: Callable[..., Any], *arguments: Any) -> Callable[..., None]:
    def deed(*_: object) -> None:
        function(*arguments)

    return deed


def c_library() -> Any:
    return ctypes.CDLL(None)


def exit_in_thread(*_: object) -> None:
    thread = threading.Thread(target=sys.exit, args=(3,))
    thread.start()
    thread.join()


def go_on_in_threads(*_: object) -> None:
    for daemon in (True, False):
        threading.Thread(target=time.sleep, args=(1000,), daemon=daemon).start()


def touch_a_truncated_file(*_: object) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
        memory[0]


def hang(*_: object) -> None:
    time.sleep(1000)


def hang_deaf(*_: object) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


def fork_and_return(calculator: Misbehaving, *_: object) -> None:
    child = os.fork()
    if child:
        calculator.note(child)
        calculator.child = child


def child_is_gone(calculator: Misbehaving) -> None:
    end = time.monotonic() + 20.0
    while calculator.child and time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(calculator.child, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
                continue
        return
    assert not calculator.child, "the child still runs"


def fork_and_stay(calculator: Misbehaving, *_: object) -> None:
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            calculator.note(os.getpid())
        time.sleep(1000)
        os._exit(0)
    calculator.note(child)


def start_programs(calculator: Misbehaving, *_: object) -> None:
    words = [["sleep", "1000"], ["setsid", "sleep", "1000"]]
    calculator.note(*(subprocess.Popen(program, stdin=subprocess.DEVNULL).pid for program in words))


def print_much(*_: object) -> None:
    for _ in range(200):
        print("energy " * 4000)
    subprocess.run(["head", "-c", "3000000", "/dev/zero"], check=True)


def leave_folder(*_: object) -> None:
    os.chdir("/")


def delete_folder(*_: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


def close_streams(*_: object) -> None:
    for number in (0, 1, 2):
        os.close(number)


def close_python_streams(*_: object) -> None:
    sys.stdout.close()
    sys.stderr.close()


def break_python_streams(*_: object) -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]


def print_and_run(*_: object) -> None:
    print("hello")
    sys.stdout.flush()
    sys.stderr.write("hello\n")
    for number in (0, 1, 2):
        os.fstat(number)
    with tempfile.TemporaryFile() as file:
        assert file.fileno() > 2


def redirect(*_: object) -> None:
    file = os.open(os.devnull, os.O_WRONLY)
    os.dup2(file, 1)


def replace_pipes(*_: object) -> None:
    file = os.open(os.devnull, os.O_RDWR)
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            os.fstat(number)
            os.dup2(file, number)


def open_too_many(calculator: Misbehaving, *_: object) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    calculator.files = [os.dup(0) for _ in range(100)]


def lower_limits(*_: object) -> None:
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (16, resource.getrlimit(limit)[1]))


def change_signals(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    signal.alarm(600)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))


def signals_are_right(*_: object) -> None:
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert subprocess.run(["false"], check=False).returncode == 1
    os.kill(os.getpid(), signal.SIGINT)  # somebody's Ctrl-C
    ignored = next(line for line in _status().splitlines() if line.startswith("SigIgn"))
    assert not int(ignored.split()[1], 16) & 1 << (signal.SIGINT - 1), "programs would not hear a Ctrl-C"


def _status() -> str:
    return subprocess.run(["cat", "/proc/self/status"], check=True, capture_output=True, text=True).stdout


def change_settings(calculator: Misbehaving, *_: object) -> None:
    os.umask(0o777)
    locale.setlocale(locale.LC_ALL, "POSIX" if calculator.begun[2] != "C" else "C.UTF-8")
    sys.setrecursionlimit(200)
    np.seterr(all="raise")
    np.random.seed(1)  # noqa: NPY002 (it must not matter)
    os.environ["OMP_NUM_THREADS"] = "64"
    warnings.simplefilter("error")


def settings_are_right(calculator: Misbehaving) -> None:
    assert settings_of_process() == calculator.begun


def settings_of_process() -> list[Any]:
    umask = os.umask(0o022)
    os.umask(umask)
    return [Path.cwd(), umask, locale.setlocale(locale.LC_ALL), sys.getrecursionlimit()]


def warn(*_: object) -> None:
    for k in range(1000):
        warnings.warn(f"number {k}", stacklevel=1)


def recurse(*_: object) -> None:
    recurse()


def move_atoms(_: Misbehaving, atoms: Atoms) -> None:
    atoms.positions[:, 1] *= 1.3


def sort_atoms(_: Misbehaving, atoms: Atoms) -> None:
    order = np.argsort(atoms.positions[:, 0])
    atoms.positions = atoms.positions[order]


def drop_an_atom(_: Misbehaving, atoms: Atoms) -> None:
    del atoms[0]


DEEDS: dict[str, Callable[..., Any]] = {
    "raise": raises(RuntimeError("the scratch disk is slow")),
    "raise BaseException": raises(Foreign("no licence")),
    "raise GeneratorExit": raises(GeneratorExit()),
    "raise StopIteration": raises(StopIteration()),
    "raise CancelledError": raises(asyncio.CancelledError()),
    "raise KeyboardInterrupt": raises(KeyboardInterrupt()),
    "raise unpicklable": raises(Unpicklable(1, 2)),
    "raise talkative": raises(Talkative()),
    "raise huge": lambda *_: raises(RuntimeError("x" * 50_000_000))(),
    "sys.exit": raises(SystemExit("SCF did not converge, stopping")),
    "sys.exit(0)": calls(sys.exit, 0),
    "exit in thread": exit_in_thread,
    "threads": go_on_in_threads,
    "recursion": recurse,
    "memory": lambda *_: np.empty(10**15),
    "warnings": warn,
    "abort": calls(os.abort),
    "segfault": calls(ctypes.string_at, 0),
    "os._exit(0)": calls(os._exit, 0),
    "os._exit(1)": calls(os._exit, 1),
    "exit of C": lambda *_: c_library().exit(0),
    "_exit of C": lambda *_: c_library()._exit(0),
    "SIGFPE": sends(signal.SIGFPE),
    "SIGKILL": sends(signal.SIGKILL),
    "SIGTERM": sends(signal.SIGTERM),
    "SIGHUP": sends(signal.SIGHUP),
    "SIGINT": sends(signal.SIGINT),
    "SIGBUS": touch_a_truncated_file,
    "hang": hang,
    "hang deaf": hang_deaf,
    "fork and return": fork_and_return,
    "fork and stay": fork_and_stay,
    "programs": start_programs,
    "print": print_much,
    "chdir": leave_folder,
    "delete folder": delete_folder,
    "close streams": close_streams,
    "close sys.stdout": close_python_streams,
    "no sys.stdout": break_python_streams,
    "redirect": redirect,
    "close pipes": calls(os.closerange, 3, 256),
    "replace pipes": replace_pipes,
    "open files": open_too_many,
    "limits": lower_limits,
    "signals": change_signals,
    "settings": change_settings,
    "move atoms": move_atoms,
    "sort atoms": sort_atoms,
    "drop an atom": drop_an_atom,
    "program fails": runs("false"),
    "program crashes": runs("sh", "-c", "kill -SEGV $$"),
    "program killed": runs("sh", "-c", "kill -KILL $$"),
}
RESULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "energy NaN": lambda results: results.update(free_energy=float("nan")),
    "forces inf": lambda results: results["forces"].__setitem__((1, 2), np.inf),
    "forces shape": lambda results: results.update(forces=results["forces"][:, :2]),
    "energy array": lambda results: results.update(free_energy=np.zeros(3)),
    "energy text": lambda results: results.update(free_energy="-1.5"),
    "forces None": lambda results: results.update(forces=None),
    "forces complex": lambda results: results.update(forces=results["forces"] + 0j),
    "no forces": lambda results: results.pop("forces"),
}
CHECKS: dict[str, Callable[[Misbehaving], None]] = {
    "fork and return": child_is_gone,
    "close streams": print_and_run,
    "close sys.stdout": print_and_run,
    "no sys.stdout": print_and_run,
    "redirect": print_and_run,
    "chdir": settings_are_right,
    "delete folder": settings_are_right,
    "settings": settings_are_right,
    "signals": signals_are_right,
}


def stops_when_made() -> NoReturn:
    sys.exit("no licence")


def raises_when_made() -> NoReturn:
    raise Foreign("no licence")


def interrupts_when_made() -> NoReturn:
    raise KeyboardInterrupt


class Ends(EMT):
    """EMT that ends the process for half of all structures."""

    def calculate(self, atoms: Atoms, *args: Any, **kwargs: Any) -> None:
        super().calculate(atoms, *args, **kwargs)
        if atoms.positions[0, 0] < 0.0:
            sys.exit("SCF did not converge, stopping")
