"""A GPU against the CPU: are the numbers the same, and how fast is it, from 10^2 to 10^6 atoms?

python tests/benchmarks/gpu.py [--device cuda] [--minutes 8] [--largest 1000000] [--json out.json]

First accuracy, in Python, in LAMMPS and in training: every quantity on the device beside that on the CPU, in double
and in mixed precision. Then time and memory per atom of MgO (56 neighbours, light network, mixed precision), plain and
with the bias of the learning loop (p = 128, every 4 steps). Each part and each size is a process of its own: where one
fails, or the memory of the GPU is used up, a line says so and the others go on. What the minutes do not suffice for is
left out, with a line, too. The exit status is 1 if a number deviates by more than is allowed or a part has failed.

A rehearsal without a GPU: python tests/benchmarks/gpu.py --device cpu --largest 1000
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and LAMMPS start

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_checks
import report
import run
import systems
import torch

from ubmd.devices import check_device
from ubmd.errors import SettingsError

SIZES = ((2, 2, 3), (5, 5, 5), (11, 11, 10), (23, 23, 24), (50, 50, 50))  # cells of 8 atoms: 96 to 10^6 atoms
MOST_STEPS = 200  # that are timed at once
OVER, FULL = "stopped, the time is over", "the memory is used up"
RESERVE = 5.0  # s that are left for the end


@dataclass
class Budget:
    """The time that is left."""

    seconds: float
    begin: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.seconds - RESERVE - (time.monotonic() - self.begin)


@dataclass
class Results:
    """All that was found, and sentences on what failed."""

    records: list[gpu_checks.Record] = field(default_factory=list)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def say(sentence: str) -> None:
    print(sentence, flush=True)


def check_part(part: str, device: str, folder: Path, budget: Budget, results: Results) -> None:
    """Run the checks of a part, whose lines are shown as they come."""
    if budget.left() < 10.0:
        skip(f"{part}: left out, the time is over", results)
        return
    say(f"--- {part}: {device} against cpu, largest difference over root mean square")
    command = [sys.executable, gpu_checks.__file__, part, device, str(folder)]
    try:
        code = subprocess.run(command, timeout=budget.left(), check=False).returncode
    except subprocess.TimeoutExpired:
        skip(f"{part}: {OVER}", results)
        code = 0
    file = folder / f"{part}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    results.records += [gpu_checks.Record(**json.loads(line)) for line in lines]
    if code:
        results.failed.append(f"{part} ended with status {code}")
        say(results.failed[-1])


def skip(sentence: str, results: Results) -> None:
    results.skipped.append(sentence)
    say(sentence)


def series(device: str, biased: bool, largest: int, folder: Path, budget: Budget, results: Results) -> None:
    """One column of the table, from small to large."""
    name = "biased" if biased else "plain"
    last = 0.0
    for cells in SIZES:
        n_atoms = 8 * cells[0] * cells[1] * cells[2]
        if n_atoms > largest:
            return
        # tenfold atoms take at most ten times as long; much less where a GPU is not full
        if budget.left() < max(15.0, 2.0 * last):
            skip(f"{name}, {n_atoms} atoms and more: left out, the time is over", results)
            return
        begin = time.monotonic()
        found = one_size(device, cells, biased, folder, budget.left())
        last = time.monotonic() - begin
        if isinstance(found, str):
            keep = results.skipped if found in (OVER, FULL) else results.failed
            keep.append(f"{name}, {n_atoms} atoms: {found}; the series ends here")
            say(keep[-1])
            return
        results.sizes.append({"series": name, **found})
        say(size_line(results.sizes[-1]))


def one_size(device: str, cells: tuple[int, ...], biased: bool, folder: Path, seconds: float) -> dict[str, float] | str:
    """The figures of a size, or why there are none."""
    request = json.dumps({"cells": cells, "biased": biased, "most_steps": MOST_STEPS})
    command = [sys.executable, gpu_checks.__file__, "size", device, str(folder), request]
    try:
        ended = subprocess.run(command, timeout=seconds, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return OVER
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if ended.returncode == 0 and lines:
        found: dict[str, float] = json.loads(lines[-1])
        return found
    text = ended.stdout + ended.stderr
    if any(words in text for words in ("out of memory", "allocate memory", "bad_alloc")) or ended.returncode == -9:
        return FULL
    last = [line for line in text.splitlines() if line.strip()]
    return f"failed with status {ended.returncode}: {last[-1] if last else 'without a word'}"


def size_line(size: dict[str, Any]) -> str:
    n = size["n_atoms"]
    return (
        f"{size['series']:7} {n:8.0f} atoms {1000 * size['seconds']:10.2f} ms/step {1e6 * size['seconds'] / n:9.3f} "
        f"µs/atom/step {size['bytes'] / n:9.0f} bytes/atom  (first step and setup {size['setup']:.1f} s)"
    )


def summary(results: Results) -> str:
    """The largest deviation of each quantity, and what failed."""
    lines = ["--- largest deviations, share of what is allowed"]
    for part in dict.fromkeys(record.part for record in results.records):
        for precision in dict.fromkeys(r.precision for r in results.records if r.part == part):
            own = [r for r in results.records if (r.part, r.precision) == (part, precision)]
            worst = max(own, key=lambda r: r.deviation / r.allowed if r.deviation == r.deviation else float("inf"))
            exceeded = sum(not r.met for r in own)
            verdict = "all met" if not exceeded else f"{exceeded} EXCEEDED"
            lines.append(f"{part:9} {precision:8} {len(own):4} numbers, {verdict}; worst: {worst.line()}")
    lines += ["--- time and memory", *(size_line(size) for size in results.sizes)] if results.sizes else []
    return "\n".join([*lines, *results.skipped, *results.failed])


def measure(device: str, largest: int, minutes: float) -> Results:
    """All parts, as far as the time goes."""
    budget, results = Budget(60.0 * minutes), Results()
    with tempfile.TemporaryDirectory(prefix="ubmd_gpu_") as name:
        folder = Path(name)
        for part in gpu_checks.PARTS:
            check_part(part, device, folder, budget, results)
        say(f"--- time and memory on {device}: MgO, light network, mixed precision")
        systems.write_model(folder, "mgo", "light128")
        for biased in (False, True):
            series(device, biased, largest, folder, budget, results)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:n, or cpu for a rehearsal")
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it ends within these (default 8)")
    parser.add_argument("--largest", type=int, default=10**6, help="atoms of the largest system (default 1000000)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    try:
        check_device(arguments.device, "--device")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    hardware = "the CPU" if arguments.device == "cpu" else torch.cuda.get_device_name(arguments.device)
    say(f"{hardware}, torch {torch.__version__}")
    results = measure(arguments.device, arguments.largest, arguments.minutes)
    say(summary(results))
    if arguments.json:
        figures = {
            "device": hardware,
            "accuracy": [gpu_checks.asdict(record) for record in results.records],
            "sizes": results.sizes,
            "skipped": results.skipped,
            "failed": results.failed,
            "circumstances": run.circumstances(quick=False),
        }
        report.write_json(arguments.json, figures)
    return int(bool(results.failed) or not all(record.met for record in results.records))


if __name__ == "__main__":
    sys.exit(main())
