"""Run a model file in LAMMPS and in Python where neither mace nor e3nn can be imported.

``python without_mace.py MODEL STRUCTURE.xyz`` prints, as JSON, the energies of both (eV) and the bias forces (eV/Å).
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest


def main(model: str, structure: str) -> None:
    for name in ("mace", "e3nn"):
        sys.modules[name] = None  # type: ignore[assignment] # now an import of it fails, wherever it is installed
        with pytest.raises(ImportError):
            import_module(name)
    import ase.io

    import ubmd
    from ubmd.lammps.session import Session

    atoms = ase.io.read(structure)
    calculator = ubmd.Calculator(model)
    with Session(model=Path(model)) as session:
        session.make_system(atoms, "double")
        session.commands(["fix b all ubmd force 0.25 window 1", "run 0"])
        found = {"lammps": session.energy(), "u": session.fix_value("b", 0)}
    found["python"] = calculator.get_potential_energy(atoms)
    found["bias"] = calculator.get_bias_forces(atoms).tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
