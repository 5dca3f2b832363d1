"""Formats that ASE does not read, through dpdata (``pip install 'ubmd[formats]'``): deepmd/npy folders, CP2K outputs.

dpdata gives virials in eV that are positive under compression, virial = -V stress: its own conversion to ASE and the
calculator of DeePMD-kit say so (https://github.com/deepmodeling/deepmd-kit/pull/338). They are handed on as virials.
CP2K prints stresses that are positive under compression, too, so that dpdata's virial = V stress has the same sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from ubmd.errors import DataError, describe

_CP2K = re.compile(rb"^\s*CP2K\|", re.MULTILINE)  # begins the lines of CP2K's own header
_HEADER = 100_000  # bytes
_IN_UNIT = re.compile(
    r"\s*(?:ENERGY\| Total FORCE_EVAL.* energy|FORCES\| Atomic forces|ATOMIC FORCES in) [\[(](\S+)[\])]"
)
_ATOMIC_UNITS = ("a.u.", "hartree", "hartree/bohr")


def is_cp2k(path: Path) -> bool:
    """Whether a file is the output of CP2K."""
    with path.open("rb") as file:
        return _CP2K.search(file.read(_HEADER)) is not None


def read_cp2k(path: Path, remark: Callable[[str], None]) -> list[Atoms]:
    """The structure in the output of a single-point calculation of CP2K; DataError if it cannot be read."""
    for line in path.read_text(errors="replace").splitlines():
        found = _IN_UNIT.match(line)
        if found and found[1] not in _ATOMIC_UNITS:  # dpdata would take them for atomic units
            raise DataError(f"{path}: '{line.strip()}': only energies and forces in atomic units can be read.")
    frames = list(_frames(_load(path, "cp2k/output", labelled=True)))
    if not frames:
        raise DataError(f"{path} is an output of CP2K without a converged calculation.")
    if b"STRESS" in path.read_bytes() and all("virial" not in atoms.info for atoms in frames):
        remark("the stress of this CP2K output is not read: dpdata knows its older layout only (STRESS TENSOR [GPa]).")
    return frames


def read_folder(path: Path) -> list[Atoms]:
    """Structures of a folder of deepmd/npy, also nested and mixed.

    Systems of nested folders come in the order of their names, with the atoms in the order of their files.

    Raises:
        DataError: it is none, it is damaged, or dpdata is not installed.
    """
    systems = sorted(file.parent for file in path.rglob("type.raw"))
    if systems:
        return [atoms for system in systems for atoms in _read_system(system)]
    raise DataError(
        f"{path} is a folder without type.raw; give a file, or a folder of deepmd/npy (type.raw, type_map.raw, "
        "set.000/coord.npy, ...)."
    )


def _read_system(folder: Path) -> list[Atoms]:
    """Structures of one deepmd/npy folder."""
    if not any(folder.glob("set.*/coord.npy")):
        raise DataError(f"{folder} has no set.*/coord.npy; deepmd/raw is not read: convert it to deepmd/npy.")
    labelled = any(folder.glob("set.*/energy.npy"))
    if not any(folder.glob("set.*/real_atom_types.npy")):
        return list(_frames(_load(folder, "deepmd/npy", labelled)))
    systems = _load(folder, "deepmd/npy/mixed", labelled, several=True)
    return [atoms for system in systems for atoms in _frames(system)]


def _load(path: Path, form: str, labelled: bool, several: bool = False) -> Any:
    """A system, or several ones, of dpdata."""
    try:
        import dpdata
    except ImportError:
        raise DataError(f"Reading {path} ({form}) needs dpdata: pip install 'ubmd[formats]'.") from None
    try:
        if several:
            return dpdata.MultiSystems().load_systems_from_file(str(path), fmt=form, labeled=labelled)
        return (dpdata.LabeledSystem if labelled else dpdata.System)(str(path), fmt=form)
    except (Exception, PendingDeprecationWarning) as error:  # dpdata's readers raise anything, warnings included
        raise DataError(f"dpdata cannot read {path} as {form}: {describe(error)}.") from error


def _frames(system: Any) -> Iterator[Atoms]:
    """Structures of a system, with energy, forces and virial under ASE's usual names."""
    data = system.data
    names = [str(data["atom_names"][kind]) for kind in data["atom_types"]]
    unknown = next((name for name in names if name not in atomic_numbers), None)
    if unknown is not None:
        raise DataError(
            f"'{unknown}' is no element: write the elements of the types into type_map.raw, in their order."
        )
    periodic = not data.get("nopbc", False)
    for number in range(len(data["coords"])):
        atoms = Atoms(names, np.asarray(data["coords"][number], dtype=float), pbc=periodic)
        if periodic:
            atoms.set_cell(np.asarray(data["cells"][number], dtype=float))
        for name, key in (("energies", "energy"), ("virials", "virial")):
            if name in data:
                atoms.info[key] = np.asarray(data[name][number], dtype=float)[()]
        if "forces" in data:
            atoms.arrays["forces"] = np.asarray(data["forces"][number], dtype=float)
        yield atoms
