"""Whose fault an error is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
from ase.build import molecule
from ase.calculators.calculator import CalculationFailed, FileIOCalculator
from ase.calculators.emt import EMT

from ubmd.errors import LabelError, MachineError
from ubmd.faults import killed_from_outside, killed_rank, machine_fault
from ubmd.learning.work.inside import guarded
from ubmd.references import label
from ubmd.references.programs import failed, scratch_folder
from ubmd.settings import ReferenceSettings


def system_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


class FailingEMT(EMT):
    """EMT that fails with ``error``."""

    error: BaseException

    def calculate(self, *_: object, **__: object) -> None:
        raise type(self).error


def raise_it(error: BaseException) -> None:
    raise error


def raise_around(error: BaseException) -> None:
    try:
        raise error
    except OSError:
        raise RuntimeError("no energy in the output") from None


@pytest.mark.parametrize("name", ["EAGAIN", "ENOMEM", "EMFILE", "ENFILE", "EROFS", "EIO", "ESTALE", "EHOSTDOWN"])
def test_what_the_machine_lacks_is_no_fault_of_a_task(name: str) -> None:
    error = system_error(name)
    for task in (raise_it, raise_around):
        _, kind, reason, _ = guarded(task, error)
        assert kind == "WorkersLost"
        start = "The task failed: the machine ran out of a resource or lost one"
        assert reason.startswith(f"{start} ([Errno {error.errno}]")


@pytest.mark.parametrize("name", ["EACCES", "ENOENT", "EPERM", "ECONNREFUSED", "EPIPE", "ECHILD", "ENOEXEC"])
def test_other_errors_are_those_of_a_task(name: str) -> None:
    assert guarded(raise_it, system_error(name))[1] == "TaskFailed"
    assert machine_fault(MemoryError()) == machine_fault(RuntimeError("x")) == ""


def test_a_full_disk_stays_one() -> None:
    assert guarded(raise_it, system_error("ENOSPC"))[1] == "StorageError"


def test_a_verdict_about_the_structure_stands() -> None:
    """Although an error of the machine came before it."""
    error = LabelError("The SCF did not converge.")
    error.__cause__ = system_error("EIO")
    assert guarded(raise_it, error)[1:3] == ("LabelError", "The SCF did not converge.")


def test_an_endless_chain_ends() -> None:
    first, second = RuntimeError("1"), RuntimeError("2")
    first.__cause__, second.__cause__ = second, first
    assert machine_fault(first) == ""


@pytest.mark.parametrize(
    ("code", "number"),
    [
        (-9, 9),
        (-15, 15),
        (137, 9),
        (143, 15),
        (129, 1),
        (-7, 7),
        (-11, 0),
        (139, 0),
        (134, 0),
        (1, 0),
        (9, 0),
        (127, 0),
    ],
)
def test_exit_codes_of_killed_programs(code: int, number: int) -> None:
    assert killed_from_outside(code) == number


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGKILL, 9), (signal.SIGSEGV, 0)])
def test_mpiexec_says_how_a_rank_ended(number: int, expected: int) -> None:
    words = ["mpiexec", "-n", "2", "sh", "-c", f"kill -{int(number)} $$"]
    for _ in range(5):  # seen on a busy machine: mpiexec itself fails ("assert (!closed) failed")
        found = subprocess.run(words, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        said = found.stdout + found.stderr
        if "BAD TERMINATION" in said:
            break
    assert killed_rank(said) == expected


def label_failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FailingEMT, "error", error, raising=False)
    monkeypatch.setattr("ase.calculators.emt.FailingEMT", FailingEMT, raising=False)
    label(molecule("H2"), ReferenceSettings(calculator="ase.calculators.emt:FailingEMT"), Path())


def test_labels_tell_faults_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"^The reference failed: the machine .*Stale file handle\)\.$"):
        label_failing(system_error("ESTALE"), monkeypatch)
    with pytest.raises(MachineError, match=r"^The reference failed: the system allows no more processes"):
        label_failing(RuntimeError("can't start new thread"), monkeypatch)
    with pytest.raises(LabelError, match=r"^The reference failed \(SystemExit: 1\)\.$"):
        label_failing(SystemExit(1), monkeypatch)
    with pytest.raises(KeyboardInterrupt):  # no worker: somebody's Ctrl-C
        label_failing(KeyboardInterrupt(), monkeypatch)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("kill -KILL $$", "killed by SIGKILL"),
        ("sh -c 'kill -TERM $$'; exit $?", "killed by SIGTERM"),
        ("kill -SEGV $$", ""),
        ("exit 1", ""),
    ],
)
def test_programs_of_ase_that_are_killed(tmp_path: Path, command: str, reason: str) -> None:
    class Shell(FileIOCalculator):
        implemented_properties = ["energy"]  # noqa: RUF012 (ASE declares it so)

    with pytest.raises(CalculationFailed) as caught:
        Shell(command=command, directory=str(tmp_path)).calculate(molecule("H2"), ["energy"], ["positions"])
    found = machine_fault(caught.value)
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_killed_program_of_ours(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("SCF step 3\n")
    killed = subprocess.CalledProcessError(-9, ["pw.x"])
    with pytest.raises(
        MachineError, match=r"^PW failed: the program was killed by SIGKILL \(often: out of memory\)\.$"
    ):
        failed("PW", killed, output, lambda _: "")
    assert str(failed("PW", killed, output, lambda _: "It says why.")) == "It says why."
    with pytest.raises(MachineError, match=r"^PW failed: it was killed by SIGTERM\.$"):
        failed("PW", BrokenPipeError(), output, lambda _: "", code=-15)
    assert "SCF step 3" in str(failed("PW", BrokenPipeError(), output, lambda _: "", code=-11))


def test_no_folder_for_scratch_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with (
        pytest.raises(MachineError, match=r"^No folder can be made in the system's temporary directory"),
        scratch_folder(),
    ):
        pass
