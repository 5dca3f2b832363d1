"""The start structure and the test set: python make_inputs.py [--frames 200]. Two minutes on one core.

Writes

  ethanol.extxyz     one ethanol molecule, at the minimum of GFN2-xTB that is nearest to ASE's geometry
  ethanol.data       the same as a LAMMPS data file, in a box with room around it
  test_gfn2.extxyz   200 frames of GFN2-xTB's own MD: half of them at 500 K, half at 1000 K (key temperature)

No potential takes part: the test set is the same for all of them, and was selected by none. It has the trans and both
gauche conformers of the C-C-O-H torsion; how many is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.io import write
from ase.optimize import BFGS
from tblite.ase import TBLite

from ubmd.data.extxyz import write_structures
from ubmd.measure.torsions import torsions
from ubmd.references.sampling import sample
from ubmd.settings import ReferenceSettings, SamplingSettings

HERE = Path(__file__).resolve().parent
TORSION = (0, 1, 2, 3)  # C-C-O-H in the order of ASE's molecule
TEMPERATURES = (500.0, 1000.0)  # K


def relaxed() -> Atoms:
    """Ethanol at a minimum of GFN2-xTB."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    BFGS(atoms, logfile=None).run(fmax=0.01)
    return Atoms(atoms.symbols, positions=atoms.positions - atoms.positions.mean(axis=0))


def test_set(atoms: Atoms, frames: int, seed: int) -> list[Atoms]:
    """Labelled frames of reference MD, two trajectories per temperature."""
    # A test set holds what the trajectories hold: no limit on forces.
    reference = ReferenceSettings(calculator="tblite", arguments={"method": "GFN2-xTB"}, force_limit=1e3)
    found = []
    for temperature in TEMPERATURES:
        share = frames // len(TEMPERATURES)
        sampling = SamplingSettings(
            temperature=temperature, frames=share, stride=100, equilibration=1000, trajectories=2, seed=seed
        )
        for frame in sample(atoms, reference, sampling, HERE):
            frame.info["temperature"] = temperature
            found.append(frame)
    return found


def main() -> None:
    """Relax, sample, write, describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--folder", type=Path, default=HERE, help="for the files (default: beside this script)")
    options = parser.parse_args()
    atoms = relaxed()
    write_structures(options.folder / "ethanol.extxyz", [atoms])
    boxed = atoms.copy()
    boxed.center(vacuum=5.0)
    write(options.folder / "ethanol.data", boxed, format="lammps-data", specorder=["H", "C", "O"], masses=True)
    frames = test_set(atoms, options.frames, options.seed)
    write_structures(options.folder / "test_gfn2.extxyz", frames)
    angles = np.abs(torsions(frames, [TORSION])[:, 0])
    trans = int((angles > np.pi * 2.0 / 3.0).sum())
    largest = max(np.linalg.norm(frame.get_forces(), axis=1).max() for frame in frames)
    print(
        f"test_gfn2.extxyz: {len(frames)} frames, {trans} of them trans, {len(frames) - trans} gauche; "
        f"largest force {largest:.1f} eV/Å"
    )


if __name__ == "__main__":
    main()
