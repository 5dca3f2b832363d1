"""Test set: 2000 frames of 1 ns of reference MD at 1200 K: python make_test_set.py [--no-cmap] [--folder FOLDER]

The MD runs in LAMMPS (half a minute), the labels come from the same reference as in the runs. Writes

  test_1200K.extxyz          one frame per 0.5 ps     (test_1200K_no_cmap.extxyz with --no-cmap)
  test_1200K_reduced.extxyz  every fifth of them      (test_1200K_no_cmap_reduced.extxyz)

and says how far LAMMPS's forces are from the labels, how much of the (phi, psi) square the frames cover, and in how
many of them an amide bond is cis: at 1200 K it flips there now and then; runs at 300 K hardly do.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.io import read
from ff19sb_lammps import start

from ubmd.data.extxyz import write_structures
from ubmd.measure.coverage import coverage
from ubmd.measure.isomers import amide_torsions, count_cis
from ubmd.measure.torsions import torsions
from ubmd.references import label
from ubmd.settings import ReferenceSettings

HERE = Path(__file__).resolve().parent
PHI_PSI = [(4, 6, 8, 14), (6, 8, 14, 16)]
DAMPING = 510.0  # fs: a friction of 1.96 /ps, as in the runs
EVERY_REDUCED = 5


def trajectory(atoms: Atoms, options: argparse.Namespace) -> list[Atoms]:
    """Frames of Langevin dynamics (0.5 fs steps)."""
    stride = round(options.duration * 2e6 / options.frames)
    with tempfile.TemporaryDirectory() as folder:
        engine = start(atoms, Path(folder), options.cmap)
        for line in (
            f"velocity all create {options.temperature} {options.seed} mom yes rot yes dist gaussian",
            "timestep 0.5",
            "fix move all nve",
            f"fix bath all langevin {options.temperature} {options.temperature} {DAMPING} {options.seed}",
            "thermo 100000",
            "run 20000 post no",  # 10 ps to warm up
        ):
            engine.command(line)
        frames = []
        for _ in range(options.frames):
            engine.command(f"run {stride} pre no post no")
            positions = np.array(engine.gather_atoms("x", 1, 3)).reshape(-1, 3)
            frames.append(Atoms(atoms.numbers, positions - positions.mean(axis=0)))
        engine.close()
    return frames


def difference(frames: list[Atoms], cmap: bool) -> float:
    """Largest difference of a force component between LAMMPS and the labels, eV/Å."""
    worst = 0.0
    for frame in frames:
        with tempfile.TemporaryDirectory() as folder:
            engine = start(frame, Path(folder), cmap)
            engine.command("run 0 post no")
            forces = np.array(engine.gather_atoms("f", 1, 3)).reshape(-1, 3) * units.kcal / units.mol
            engine.close()
        worst = max(worst, float(np.abs(forces - frame.get_forces()).max()))
    return worst


def main() -> None:
    """Sample, label, write, describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help="for the files (default: beside this script)")
    parser.add_argument("--no-cmap", dest="cmap", action="store_false", help="reference without correction maps")
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--duration", type=float, default=1.0, help="ns")
    parser.add_argument("--temperature", type=float, default=1200.0, help="K")
    parser.add_argument("--seed", type=int, default=12345)
    options = parser.parse_args()
    arguments = {"pdb": "alanine_dipeptide.pdb", "cmap": options.cmap}
    # A test set holds what the trajectory holds: no limit on forces.
    reference = ReferenceSettings(calculator="openmm", arguments=arguments, force_limit=1e3, energy_limit=1e3)
    start_structure = read(HERE / "c7eq.extxyz")
    frames = [label(frame, reference, HERE) for frame in trajectory(start_structure, options)]
    name = f"test_{options.temperature:.0f}K" + ("" if options.cmap else "_no_cmap")
    reduced = frames[:: min(EVERY_REDUCED, len(frames))]
    for path, part in ((f"{name}.extxyz", frames), (f"{name}_reduced.extxyz", reduced)):
        write_structures(options.folder / path, part)
        cis = count_cis(part, amide_torsions(start_structure))
        covered = coverage(torsions(part, PHI_PSI))
        force = max(np.linalg.norm(frame.get_forces(), axis=1).max() for frame in part)
        print(
            f"{path}: {len(part)} frames, {cis} of them with a cis amide bond; coverage {covered:.3f}; "
            f"largest force {force:.1f} eV/Å"
        )
    print(f"LAMMPS and OpenMM differ by at most {difference(frames[::100], options.cmap):.1e} eV/Å.")


if __name__ == "__main__":
    main()
