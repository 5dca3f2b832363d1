"""What a model file says of a structure, in Python and in LAMMPS: for the golden models, and for the test of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

import ubmd

NAMES = ("pe", "press", "pxx", "pyy", "pzz", "pxy", "pxz", "pyz", "f_b", *(f"f_b[{k}]" for k in range(1, 11)))
"""Of numbers that LAMMPS says, in units metal."""
COLUMNS = ("fx", "fy", "fz", "f_b[1]", "f_b[2]", "f_b[3]", "f_b[4]")
"""Of numbers that it says of each atom."""


def by_calculator(model: Path, atoms: Atoms) -> dict[str, Any]:
    """Energy eV, forces eV/Å, stress eV/Å^3 if there is one, uncertainties eV/atom and eV/Å, bias forces eV/Å."""
    calculator = ubmd.Calculator(model)
    copy = atoms.copy()
    copy.calc = calculator
    copy.get_potential_energy()
    names = ("energy", "forces", "stress", "uncertainty", "atomic_uncertainties")
    found = {name: calculator.results[name] for name in names if name in calculator.results}
    found["bias_forces"] = calculator.get_bias_forces(atoms)
    return {name: np.asarray(value).tolist() for name, value in found.items()}


def by_lammps(model: Path, data: Path, elements: str, bias: str, folder: Path) -> dict[str, Any]:
    """Numbers by `NAMES` and `COLUMNS` at the first step, with bias forces, and perhaps a bias stress.

    Args:
        model: the file.
        data: of LAMMPS.
        elements: of its types.
        bias: keywords of fix ubmd.
        folder: to work in; holds the dump afterwards.
    """
    boundary = "f f f" if "cluster" in data.name else "p p p"
    reports = "".join(f'print "SAYS {name} $({name}:%.17g)"\n' for name in NAMES)
    (folder / "in.golden").write_text(f"""
        units metal
        atom_style atomic
        atom_modify map array sort 0 0
        newton on
        boundary {boundary}
        read_data {data}
        neighbor 1.0 bin
        pair_style ubmd precision double
        pair_coeff * * {model} {elements}
        fix b all ubmd {bias} window 1
        dump d all custom 1 dump.golden {" ".join(COLUMNS)}
        dump_modify d sort id format float %.17g
        thermo_style custom step pe press
        run 0
        {reports}
        """)
    command = [str(Path(sys.executable).parent / "lmp"), "-in", "in.golden", "-log", "none", "-nocite"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("SAYS ")]
    rows = (folder / "dump.golden").read_text().split("ITEM: ATOMS")[1].splitlines()[1:]
    atoms = np.array([[float(word) for word in row.split()] for row in rows]).T
    found: dict[str, Any] = {name: float(value) for _, name, value in lines}
    return found | {f"atoms {name}": column.tolist() for name, column in zip(COLUMNS, atoms, strict=True)}
