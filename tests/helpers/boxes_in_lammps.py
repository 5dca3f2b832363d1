"""What LAMMPS says of several structures with a model file and a bias, in one process for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.lammps import Prism

BAR = 1.6021765e6  # bar per eV/Å^3, LAMMPS's own constant in units metal: the virials below are in eV without it
_VOIGT = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])  # xx yy zz xy xz yz
_NUMBERS = ["pe", "vol", *(f"c_{name}[{k}]" for name in ("pair", "bias") for k in range(1, 7))]
_OF_FIX = [f"f_b[{k}]" for k in range(1, 6)]
_BOX = """
clear
units metal
atom_style atomic
atom_modify map array sort 0 0
boundary {boundary}
read_data {data}
neighbor 1.0 bin
pair_style ubmd
pair_coeff * * {model} {elements}
fix b all ubmd force {force} {stress} window 1
compute pair all pressure NULL pair
compute bias all pressure NULL fix
dump d all custom 1 {dump} fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
thermo_style custom step pe c_pair[1] c_bias[1]
run 0
"""


@dataclass(frozen=True)
class Said:
    """Of one structure, in its own frame: eV, eV/Å; virials [3, 3] in eV, minus the energy's derivative by strain."""

    energy: float
    forces: np.ndarray
    """of the potential alone"""
    virial: np.ndarray
    u: float
    atomic_u: np.ndarray
    bias: np.ndarray
    scale: float
    """eV/Å over that of du/dr"""
    bias_virial: np.ndarray
    stress_scale: float


def said_by_lammps(
    model: Path,
    structures: Sequence[Atoms],
    elements: Sequence[str],
    ranks: int,
    force: float,
    stress: float,
    folder: Path,
) -> list[Said]:
    """One evaluation of each structure; ``force`` and ``stress``: strengths of the bias."""
    script = ""
    for k, atoms in enumerate(structures):
        box = atoms.copy()
        if not atoms.pbc.any():
            box.center(vacuum=8.0)
        ase.io.write(folder / f"{k}.data", box, format="lammps-data", specorder=list(elements), masses=True)
        whole = bool(atoms.pbc.all())
        script += _BOX.format(
            boundary="p p p" if whole else "f f f",
            data=f"{k}.data",
            model=model,
            elements=" ".join(elements),
            force=force,
            stress=f"stress {stress}" if whole else "",
            dump=f"{k}.dump",
        )
        script += "".join(f'print "SAYS {k} {name} $({name}:%.17g)"\n' for name in (*_NUMBERS, *_OF_FIX))
    (folder / "in.boxes").write_text(script)
    programs = Path(sys.executable).parent
    mpiexec = [str(programs / "mpiexec"), "-n", str(ranks)] if ranks > 1 else []
    command = [*mpiexec, str(programs / "lmp"), "-in", "in.boxes", "-log", "none", "-nocite"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    words = [line.split() for line in done.stdout.splitlines() if line.startswith("SAYS ")]
    numbers = {(int(k), name): float(value) for _, k, name, value in words}
    return [
        _said({name: value for (box, name), value in numbers.items() if box == k}, folder / f"{k}.dump", atoms)
        for k, atoms in enumerate(structures)
    ]


def _said(numbers: dict[str, float], dump: Path, atoms: Atoms) -> Said:
    rows = dump.read_text().split("ITEM: ATOMS")[1].splitlines()[1:]
    columns = np.array([[float(word) for word in row.split()] for row in rows])
    prism = Prism(atoms.cell.array) if atoms.pbc.all() else None

    def turned(vectors: np.ndarray) -> np.ndarray:
        return vectors if prism is None else prism.vector_to_ase(vectors)

    def virial(name: str) -> np.ndarray:
        tensor = np.zeros((3, 3))
        values = [numbers[f"c_{name}[{k}]"] * numbers["vol"] / BAR for k in range(1, 7)]
        tensor[_VOIGT] = tensor[_VOIGT[::-1]] = values
        return tensor if prism is None else prism.tensor2_to_ase(tensor)

    bias = turned(columns[:, 4:])
    return Said(
        energy=numbers["pe"],
        forces=turned(columns[:, :3]) - bias,
        virial=virial("pair"),
        u=numbers["f_b[1]"],
        atomic_u=columns[:, 3],
        bias=bias,
        scale=numbers["f_b[4]"],
        bias_virial=virial("bias"),
        stress_scale=numbers["f_b[5]"],
    )
