"""Test sets that no student has made: python make_test_set.py [--reference sevennet] [--frames 6]

test.extxyz      MD of the teacher itself in rock salt, 64 atoms, at 300, 1000 and 2000 K
outside.extxyz   what the run does not sample: an oxygen vacancy, the caesium chloride and wurtzite phases, and rock
                 salt with displacements of 0.15 Å

--frames structures of each kind, labelled by the teacher: some 200 steps and 42 labels of 64 atoms. The folder labels
keeps labels for the next call.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk

from ubmd.data.extxyz import write_structures
from ubmd.references import label, sample
from ubmd.settings import ReferenceSettings, SamplingSettings

TEMPERATURES = {300.0: 1.003, 1000.0: 1.012, 2000.0: 1.03}  # K: length of the cell, relative to a = 4.25 Å


def molecular_dynamics(reference: ReferenceSettings, count: int) -> list[Atoms]:
    """Frames of Langevin MD with the teacher."""
    frames = []
    for temperature, length in TEMPERATURES.items():
        crystal = bulk("MgO", "rocksalt", a=4.25 * length, cubic=True).repeat(2)
        crystal.rattle(0.055 * np.sqrt(temperature / 300.0), seed=1)  # as far as atoms are at this temperature
        sampling = SamplingSettings(
            temperature=temperature, frames=count, trajectories=1, timestep=2.0, equilibration=20, stride=8
        )
        frames += named(sample(crystal, reference, sampling, Path()), f"{temperature:g} K")
        print(f"{temperature:g} K: {count} frames", flush=True)
    return frames


def outside(reference: ReferenceSettings, count: int) -> list[Atoms]:
    """Labelled random structures that differ from those of the run."""
    rock_salt = bulk("MgO", "rocksalt", a=4.25, cubic=True).repeat(2)
    vacancy = rock_salt.copy()
    del vacancy[int(np.flatnonzero(vacancy.numbers == 8)[0])]
    kinds = {  # crystal, displacements in Å, largest change of its lengths
        "vacancy": (vacancy, 0.1, 0.01),
        "caesium chloride": (bulk("MgO", "cesiumchloride", a=2.66).repeat(3), 0.1, 0.05),
        "wurtzite": (bulk("MgO", "wurtzite", a=3.32, c=5.0).repeat((4, 4, 2)), 0.1, 0.05),
        "0.15 Å": (rock_salt, 0.15, 0.01),
    }
    frames = []
    for name, (crystal, displacement, strain) in kinds.items():
        made = [moved(crystal, displacement, strain * (2 * k / max(count - 1, 1) - 1), seed=k) for k in range(count)]
        frames += named([label(atoms, reference, Path()) for atoms in made], name)
        print(f"{name}: {count} structures of {len(crystal)} atoms", flush=True)
    return frames


def moved(crystal: Atoms, displacement: float, strain: float, seed: int) -> Atoms:
    """A copy in a larger or smaller cell, its atoms moved by normal random numbers of this width (Å)."""
    atoms = crystal.copy()
    atoms.set_cell(atoms.cell * (1.0 + strain), scale_atoms=True)
    atoms.rattle(displacement, seed=seed)
    return atoms


def named(frames: list[Atoms], name: str) -> list[Atoms]:
    """The frames, each with the name of its kind."""
    for atoms in frames:
        atoms.info["config_type"] = name
    return frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", choices=("sevennet", "chgnet"), default="sevennet", help="the teacher")
    parser.add_argument("--frames", type=int, default=6, help="structures of each kind")
    options = parser.parse_args()
    reference = ReferenceSettings(calculator=options.reference, force_limit=100.0, cache="labels")
    write_structures(Path("outside.extxyz"), outside(reference, options.frames))
    write_structures(Path("test.extxyz"), molecular_dynamics(reference, options.frames))


if __name__ == "__main__":
    main()
