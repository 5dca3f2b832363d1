"""How far is the reference (QuickFF) from others? python spot_check.py xtb|cp2k [--frames 8] [--threads 1]

Labels frames of the test set, evenly spread over the volumes, with a second reference:

  xtb    GFN1-xTB (pip install tblite; 1 s per frame, Γ point only)
  cp2k   PBE-D3(BJ), TZVP, 1000 Ry: the paper's settings (apt-get install cp2k; 4 to 10 min and 3.5 GB per frame)

and prints for each frame volume, energy above the lowest of them, pressure, and the RMS difference of the forces.
Labels are kept in spot_check_NAME.extxyz; frames that are there are not computed again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.io import read

from ubmd.data.extxyz import append_structures
from ubmd.references import label
from ubmd.settings import ReferenceSettings

HERE = Path(__file__).resolve().parent
MPA = 1e6 * units.Pascal


def reference(name: str, threads: int) -> ReferenceSettings:
    """Settings of the second reference; no limit on forces or energies."""
    arguments = {"xtb": {"method": "GFN1-xTB"}, "cp2k": {"preset": "paper", "threads": threads}}[name]
    return ReferenceSettings(
        calculator={"xtb": "tblite", "cp2k": "cp2k"}[name],
        arguments=arguments,
        environment={"OMP_NUM_THREADS": str(threads)},
        timeout=7200.0,
        force_limit=1e3,
        energy_limit=1e3,
    )


def spread(frames: list[Atoms], count: int) -> list[Atoms]:
    """``count`` frames, evenly spread over the order of their volumes."""
    ordered = sorted(frames, key=Atoms.get_volume)
    return [ordered[round(k)] for k in np.linspace(0, len(ordered) - 1, count)]


def second_labels(frames: list[Atoms], settings: ReferenceSettings, kept: Path) -> list[Atoms]:
    """Labels of these frames, from the file or computed now."""
    known = {atoms.positions.tobytes(): atoms for atoms in (read(kept, ":") if kept.exists() else [])}
    labels = []
    for frame in frames:
        if frame.positions.tobytes() not in known:
            begin = time.monotonic()
            atoms = label(Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=True), settings, HERE)
            atoms.info["seconds"] = round(time.monotonic() - begin, 2)
            append_structures(kept, [atoms])
            known[frame.positions.tobytes()] = atoms
        labels.append(known[frame.positions.tobytes()])
    return labels


def table(first: list[Atoms], second: list[Atoms], name: str) -> str:
    """One line per frame; energies in meV/atom above the frame of lowest energy."""
    energies = [np.array([a.get_potential_energy() / len(a) for a in atoms]) * 1000 for atoms in (first, second)]
    names = ("QuickFF", name)
    columns = [f"{column} {n}, {unit}" for column, unit in (("E", "meV/atom"), ("p", "MPa")) for n in names]
    head = ["V, Å^3", *columns, "RMS F QuickFF, eV/Å", "F differ by", "s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        pressures = [-float(x.get_stress()[:3].mean()) / MPA for x in (a, b)]
        size, apart = (np.sqrt(np.mean(f**2)) for f in (a.get_forces(), a.get_forces() - b.get_forces()))
        cells = [f"{a.get_volume():.0f}", *(f"{e[k] - e.min():.1f}" for e in energies)]
        cells += [*(f"{p:.0f}" for p in pressures), f"{size:.3f}", f"{apart:.3f}", f"{b.info['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Label what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", choices=("xtb", "cp2k"))
    parser.add_argument("--frames", type=int, help="default: 8 for xtb, 2 for cp2k")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file", type=Path, default=HERE / "test_600K_reduced.extxyz", help="from make_inputs.py")
    options = parser.parse_args()
    frames = spread(read(options.file, ":"), options.frames or {"xtb": 8, "cp2k": 2}[options.reference])
    kept = options.file.with_name(f"spot_check_{options.reference}.extxyz")
    labels = second_labels(frames, reference(options.reference, options.threads), kept)
    print(table(frames, labels, {"xtb": "GFN1-xTB", "cp2k": "PBE-D3"}[options.reference]))


if __name__ == "__main__":
    main()
