"""Two versions of ubmd side by side: the figures of another one beside those of this one, measured in turn.

python tests/benchmarks/beside.py OTHER_PYTHON [--rounds 3] [--groups medium small train]

OTHER_PYTHON: interpreter of an environment in which the other version is installed. Each round runs groups of
`run.py --quick` with either; of times the shortest counts, of all other figures that of the round with the shortest
step of 512 atoms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report

RUN = Path(__file__).with_name("run.py")
TIMES = ("us_per_atom", "ms_", "train_ms", "gflops")


def figures(python: str, groups: list[str], file: Path) -> dict[str, Any]:
    """Of one run with an interpreter. Raises CalledProcessError with what it printed if it fails."""
    command = [python, str(RUN), "--quick", "--groups", *groups, "--json", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The shortest times (largest speeds) of all rounds, ratios from the fastest one."""
    fastest = min(rounds, key=lambda one: one.get("us_per_atom_512") or float("inf"))
    merged = dict(fastest)
    for key, value in fastest.items():
        if key.startswith(TIMES) and isinstance(value, float):
            merged[key] = (max if key.startswith("gflops") else min)(one[key] for one in rounds)
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="interpreter of the other version's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", nargs="+", default=["medium", "small", "first", "train"])
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {arguments.other: [], sys.executable: []}
    with tempfile.TemporaryDirectory(prefix="ubmd_beside_") as folder:
        for _ in range(arguments.rounds):
            for python, results in found.items():
                results.append(figures(python, arguments.groups, Path(folder) / "figures.json"))
    other, this = (best(results) for results in found.values())
    print(f"{'':82} {'other':>10} {'this':>10} {'other/this':>10}")
    for row in report.TABLE:
        if isinstance(row, str):
            continue
        a, b = other.get(row.key), this.get(row.key)
        if isinstance(a, float) and isinstance(b, float):
            print(f"{row.meaning:69} {row.unit:12} {report.number(a):>10} {report.number(b):>10} {a / b:10.2f}")


if __name__ == "__main__":
    main()
