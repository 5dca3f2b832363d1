"""Labels of alanine dipeptide for coverage.py and ../calibration/splits.py: python inputs.py [--out alanine]

From MD with the force field at 500 K: train.extxyz (64 frames), valid.extxyz (16) and pool.extxyz (320, for splits into
calibration and test); hot.extxyz: 400 frames of MD at 1200 K. A minute on one core.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import ase.io

from ubmd.data.extxyz import write_structures

SCRIPT = Path(__file__).resolve().parent.parent / "alanine_dipeptide" / "make_test_set.py"


def frames(temperature: int, folder: str) -> list[ase.Atoms]:
    """400 labelled frames, 1 ps apart."""
    words = ["--temperature", str(temperature), "--frames", "400", "--duration", "0.4", "--folder", folder]
    subprocess.run([sys.executable, SCRIPT, *words], check=True)
    found: list[ase.Atoms] = ase.io.read(Path(folder) / f"test_{temperature}K.extxyz", ":")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("alanine"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        warm, hot = frames(500, folder), frames(1200, folder)
    chosen = warm[::5]  # 80
    write_structures(out / "valid.extxyz", chosen[4::5])
    write_structures(out / "train.extxyz", [atoms for k, atoms in enumerate(chosen) if k % 5 != 4])
    write_structures(out / "pool.extxyz", [atoms for k, atoms in enumerate(warm) if k % 5])
    write_structures(out / "hot.extxyz", hot)


if __name__ == "__main__":
    main()
