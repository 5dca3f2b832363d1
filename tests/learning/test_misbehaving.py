"""Calculators that misbehave: what becomes of their label, and that all other labels are right."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from processes import is_alive, wait_for

from ubmd.data.extxyz import write_structures
from ubmd.data.structures import read_structures
from ubmd.errors import LabelError, SettingsError
from ubmd.learning.labels import label_batch, read_batch
from ubmd.learning.work.tasks import label_file
from ubmd.learning.work.workers import TaskCrashed, TaskTimeout, Workers, WorkersLost, outcome
from ubmd.settings import ReferenceSettings

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals and /proc of Linux")

RIGHT = None
TIMEOUT = 3.0  # s, of labels that hang
KINDS = {
    "raise": (LabelError, r"^The reference failed \(RuntimeError: the scratch disk is slow\)\.$"),
    "raise BaseException": (LabelError, r"^The reference failed \(Foreign: no licence\)\.$"),
    "raise GeneratorExit": (LabelError, r"^The reference failed \(GeneratorExit\)\.$"),
    "raise StopIteration": (LabelError, r"^The reference failed \(.*StopIteration.*\)\.$"),
    "raise CancelledError": (LabelError, r"^The reference failed \(CancelledError\)\.$"),
    "raise KeyboardInterrupt": (LabelError, r"^The reference failed \(KeyboardInterrupt\)\.$"),
    "raise unpicklable": (LabelError, r"^The reference failed \(Unpicklable: 1 and 2\)\.$"),
    "raise talkative": (LabelError, r"^The reference failed \(Talkative: \(its message cannot be shown\)\)\.$"),
    "raise huge": (LabelError, r"^The reference failed \(RuntimeError: x{400,} … \(cut: [\d,]+ characters\)"),
    "sys.exit": (LabelError, r"^The reference did not converge|^The reference failed \(SystemExit: SCF did not conv"),
    "sys.exit(0)": (LabelError, r"^The reference failed \(SystemExit: 0\)\.$"),
    "exit in thread": RIGHT,
    "threads": RIGHT,
    "recursion": (LabelError, r"^The reference failed \(RecursionError: "),
    "memory": (LabelError, r"^The reference failed \(.*MemoryError: "),
    "warnings": RIGHT,
    "abort": (TaskCrashed, r"^The worker process was killed by SIGABRT\.$"),
    "segfault": (TaskCrashed, r"^The worker process was killed by SIGSEGV \(a crash in compiled code\)\.$"),
    "SIGFPE": (TaskCrashed, r"^The worker process was killed by SIGFPE\.$"),
    "os._exit(0)": (TaskCrashed, r"^The worker process ended by itself with exit code 0\.$"),
    "os._exit(1)": (TaskCrashed, r"^The worker process ended by itself with exit code 1\.$"),
    "exit of C": (TaskCrashed, r"^The worker process ended by itself with exit code 0\.$"),
    "_exit of C": (TaskCrashed, r"^The worker process ended by itself with exit code 0\.$"),
    "SIGKILL": (WorkersLost, r"^The worker process was killed by SIGKILL \(often: out of memory\)\.$"),
    "SIGTERM": (WorkersLost, r"^The worker process was killed by SIGTERM\.$"),
    "SIGHUP": (WorkersLost, r"^The worker process was killed by SIGHUP\.$"),
    "SIGBUS": (WorkersLost, r"^The worker process was killed by SIGBUS \(often: /dev/shm or a disk is full\)\.$"),
    "SIGINT": RIGHT,
    "hang": (TaskTimeout, r"^It took longer than the limit of 3 s\.$"),
    "hang deaf": (TaskTimeout, r"^It took longer than the limit of 3 s\.$"),
    "fork and return": RIGHT,
    "fork and stay": RIGHT,
    "programs": RIGHT,
    "print": RIGHT,
    "chdir": RIGHT,
    "delete folder": RIGHT,
    "close streams": RIGHT,
    "close sys.stdout": RIGHT,
    "no sys.stdout": RIGHT,
    "redirect": RIGHT,
    "close pipes": (TaskCrashed, r"^The task closed files \(pipes\) that its worker process needs"),
    "replace pipes": (TaskCrashed, r"^The task closed files \(pipes\) that its worker process needs"),
    "open files": (WorkersLost, r"^The reference failed: the machine ran out of .*Too many open files"),
    "limits": RIGHT,
    "signals": RIGHT,
    "settings": RIGHT,
    "move atoms": (LabelError, r"^The reference moved the atoms before it computed them"),
    "sort atoms": (LabelError, r"^The reference sorted the atoms"),
    "drop an atom": (LabelError, r"^The reference failed \(ValueError: "),
    "energy NaN": (LabelError, r"^The reference returned a label that is not finite \(energy\)\.$"),
    "forces inf": (LabelError, r"^The reference returned a label that is not finite \(forces\)\.$"),
    "forces shape": (LabelError, r"^The reference returned forces of shape \(4, 2\) for 4 atoms"),
    "energy array": (LabelError, r"^The reference returned an energy of shape \(3,\)"),
    "energy text": (LabelError, r"^The reference returned energy with values that are not numbers \(str\)"),
    "forces None": (LabelError, r"^The reference returned no forces \(None\)\.$"),
    "forces complex": (LabelError, r"^The reference returned forces with complex numbers\.$"),
    "no forces": (LabelError, r"^The reference computes no forces"),
    "program fails": (LabelError, r"^The reference failed \(CalledProcessError: .*exit status 1\.\)\.$"),
    "program crashes": (LabelError, r"^The reference failed \(CalledProcessError: .*SIGSEGV.*\)\.$"),
    "program killed": (WorkersLost, r"^The reference failed: the program was killed by SIGKILL \(often: out of mem"),
}


DEAR = ("os._exit(1)", "_exit of C", "SIGFPE", "SIGHUP", "SIGTERM", "replace pipes", "hang")  # new processes, as others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("misbehaving")


@pytest.fixture(scope="module")
def labels(request: pytest.FixtureRequest, folder: Path) -> Iterator[dict[str, list[Future[Any]]]]:
    """All labels: those of one calculator in one worker, each of which finds what the last one has left behind."""
    parameters = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    kinds = [kind for kind in KINDS if any(p.get("kind") == kind for p in parameters)]
    (folder / "pids").touch()
    with Workers(1) as one, Workers(1) as other:
        yield {kind: submit(workers, folder, kind) for kind, workers in zip(kinds, itertools.cycle([one, other]))}
    left = [int(number) for number in (folder / "pids").read_text().split()]
    assert wait_for(lambda: not any(is_alive(process) for process in left)), "something still runs"


def submit(workers: Workers, folder: Path, kind: str) -> list[Future[Any]]:
    arguments = {"kind": kind, "pids": str(folder / "pids")}
    settings = ReferenceSettings(calculator="misbehaving:Misbehaving", arguments=arguments)
    futures = []
    for k, atoms in enumerate(make_structures()):
        source, target = files(folder, kind, k)
        write_structures(source, [atoms])
        timeout = TIMEOUT if k == 1 and kind.startswith("hang") else 300.0
        futures.append(workers.submit(label_file, source, target, "key", settings, folder, timeout=timeout))
    return futures


def files(folder: Path, kind: str, number: int) -> tuple[Path, Path]:
    """Of a structure and its label."""
    place = folder / kind.replace("/", " ")
    return place / f"candidate_{number}.extxyz", place / f"label_{number}.extxyz"


def make_structures() -> list[Atoms]:
    """Four clusters, the second of which is far away."""
    rng = np.random.default_rng(3)
    square = Atoms("Cu4", [[2.5, 0, 0], [0, 0, 0], [0, 2.5, 0], [2.5, 2.5, 0]])  # not in the order of x
    structures = [square.copy() for _ in range(4)]
    for k, atoms in enumerate(structures):
        atoms.positions += rng.uniform(-0.2, 0.2, (4, 3))
        atoms.positions[:, 0] += 150.0 if k == 1 else 0.0
    return structures


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in DEAR else kind for kind in KINDS]
)
def test_one_label_is_its_own_business(labels: dict[str, list[Future[Any]]], folder: Path, kind: str) -> None:
    for k, (atoms, future) in enumerate(zip(make_structures(), labels[kind], strict=True)):
        if k == 1 and KINDS[kind] is not RIGHT:
            error, reason = KINDS[kind]
            with pytest.raises(error, match=reason) as caught:
                outcome(future)
            assert type(caught.value) is error
            continue
        outcome(future)
        labelled = read_structures(files(folder, kind, k)[1], labelled=True)[0]
        atoms.calc = EMT()
        assert labelled.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
        assert np.allclose(labelled.get_forces(), atoms.get_forces(), rtol=0.0, atol=1e-12)


@pytest.fixture(scope="module")
def ending() -> Iterator[Workers]:
    with Workers(1) as workers:
        yield workers


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("stops_when_made", "SystemExit: no licence"),
        ("raises_when_made", "Foreign: no licence"),
        ("interrupts_when_made", "KeyboardInterrupt"),
    ],
)
def test_a_calculator_that_ends_while_it_is_made(ending: Workers, tmp_path: Path, name: str, reason: str) -> None:
    write_structures(tmp_path / "candidate.extxyz", make_structures()[:1])
    settings = ReferenceSettings(calculator=f"misbehaving:{name}")
    arguments = tmp_path / "candidate.extxyz", tmp_path / "label.extxyz", "key", settings, tmp_path
    with pytest.raises(SettingsError, match=rf"^reference.arguments don't suit the calculator .*: {reason}$"):
        outcome(ending.submit(label_file, *arguments, timeout=100.0))


def test_a_batch_of_which_half_ends_the_process(ending: Workers, tmp_path: Path) -> None:
    structures = make_structures()
    for k, x in enumerate((-0.1, 0.1, 0.2, -0.2)):
        structures[k].positions[:, 0] += x - structures[k].positions[0, 0]
    settings = ReferenceSettings(calculator="misbehaving:Ends")
    label_batch(structures, tmp_path, settings, tmp_path, ending, lambda *_: None)
    labelled, rejected = read_batch(tmp_path)
    assert [atoms.positions[0, 0] for atoms in labelled] == pytest.approx([0.1, 0.2])
    reason = "The reference did not converge (SystemExit: SCF did not converge, stopping)."
    assert [atoms.info["reason"] for atoms in rejected] == [reason, reason]
