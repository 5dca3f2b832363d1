"""External programs as references: each label runs in a folder of its own and leaves nothing behind.

Programs start in the worker's session with the worker's environment, so that they can be ended together with it;
on Linux the kernel also ends them with the process that has started them.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from ubmd.errors import LabelError, MachineError, SettingsError, describe
from ubmd.faults import FULL, killed_by, killed_from_outside, killed_rank, machine_fault

_PROPERTIES = ("energy", "free_energy", "forces", "stress")
_TAIL = 3  # last lines of an output that a reason quotes


Runner = Callable[[Atoms, Path], dict[str, Any]]
"""How a program computes a structure in an empty folder: the results, or a LabelError with the reason."""


class ProgramCalculator(Calculator):
    """An ASE calculator that starts a program (or a library) from scratch for every structure.

    Nothing is carried over from the last structure: a label depends on its structure alone, whichever worker makes it.
    """

    implemented_properties = list(_PROPERTIES)  # noqa: RUF012 (ASE declares it so)
    writes_files = False  # to its directory: every structure has a scratch folder
    model = ""  # which one, where a package contains several: for records

    def __init__(self, run: Runner) -> None:
        """``run`` computes one structure in a folder."""
        super().__init__()
        self._run = run

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fill ``results``; LabelError if the program fails or does not converge."""
        super().calculate(atoms, properties, system_changes)
        with scratch_folder() as folder:
            results = self._run(cast(Atoms, self.atoms).copy(), folder)
        self.results: dict[str, Any] = {name: results[name] for name in _PROPERTIES if results.get(name) is not None}


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder under the system's temporary directory; it is removed afterwards, also after a failure.

    Folders that killed processes of this machine have left are removed, too.

    Raises:
        MachineError: it cannot be made (a full disk is an OSError).
    """
    try:
        sweep_scratch()
        prefix = f"{_scratch_name()}{os.getpid()}_"
        scratch = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise MachineError(f"No folder can be made in the system's temporary directory (TMPDIR): {error}.") from error
    with scratch as folder:
        yield Path(folder)


def sweep_scratch() -> None:
    """Remove scratch folders whose process (of this machine, by this user) is gone."""
    for folder in scratch_folders():
        process = folder.name.removeprefix(_scratch_name()).partition("_")[0]
        if process.isdigit() and not _exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def scratch_folders() -> list[Path]:
    """Scratch folders of this machine."""
    return sorted(Path(tempfile.gettempdir()).glob(f"{_scratch_name()}*"))


def _scratch_name() -> str:
    # Several machines may share a temporary directory: each sweeps its own.
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    return f"ubmd_label_{host}_"


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def command_line(program: str, launcher: str, threads: int, package: str) -> list[str]:
    """Words that start a program: ``setpriv --pdeathsig KILL env OMP_NUM_THREADS=… launcher program``.

    Args:
        program: name or path, perhaps with options.
        launcher: what stands before it, e.g. 'mpiexec -n 4'.
        threads: OpenMP threads of each of its processes.
        package: what to install if it is missing.

    Raises:
        SettingsError: the program or its launcher is not installed.
    """
    words, before = shlex.split(program), shlex.split(launcher)
    if not words or shutil.which(words[0]) is None:
        raise SettingsError(
            f"The program {program!r} is not installed or not on the PATH; install it (Debian: apt-get install "
            f"{package}) or give its path in reference.arguments.command."
        )
    if before and shutil.which(before[0]) is None:
        raise SettingsError(f"reference.arguments.launcher: there is no program {before[0]!r} on the PATH.")
    tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []  # util-linux; elsewhere without
    return [*tied, "env", f"OMP_NUM_THREADS={threads}", *before, *words]


def tail(path: Path) -> str:
    """The last lines of an output file on one line, for a reason."""
    if not path.is_file():
        return "no output"
    lines = [" ".join(line.split()) for line in path.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line.strip(" *-=%")]
    return " | ".join(told[-_TAIL:])[-300:] or "no output"


def failed(
    program: str, error: BaseException, output: Path, translate: Callable[[str], str], code: int = 0
) -> LabelError:
    """The reason for a failure: a sentence that ``translate`` finds in the program's output, else its last lines.

    Args:
        program: its name.
        error: what was raised.
        output: the program's file.
        translate: the text of the output -> a sentence, or an empty text.
        code: the program's exit code, where the error does not say it.

    Raises:
        MachineError: the program was killed from outside, or the machine ran out of something.
        OSError: the disk is full.
    """
    if isinstance(error, OSError) and error.errno in FULL:
        raise error
    text = output.read_text(errors="replace") if output.is_file() else ""
    reason = translate(text)
    number = killed_from_outside(code) or killed_rank(text)
    fault = f"it was {killed_by(number)}" if number else machine_fault(error)
    if fault and not reason:
        raise MachineError(f"{program} failed: {fault}.") from error
    return LabelError(reason or f"{program} failed ({describe(error)}); its last output: {tail(output)}")


def folder_of(base: Path, name: str | Path, argument: str) -> str:
    """Full path of a folder; SettingsError if it is not there."""
    path = (Path(base) / Path(name).expanduser()).resolve()
    if not path.is_dir():
        raise SettingsError(f"reference.arguments.{argument}: there is no folder {path}.")
    return str(path)
