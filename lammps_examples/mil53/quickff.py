"""The QuickFF force field of the metal-organic framework MIL-53(Al), read from LAMMPS's own examples.

Settings name it by its import path: reference.calculator = "quickff:quickff_mil53"; elsewhere, copy this file beside
the settings file. Runs that were begun with its old name "quickff_mil53" find it through a link in ubmd/references.
"""

from __future__ import annotations

from pathlib import Path

from ubmd.errors import SettingsError
from ubmd.references.lammps import LAMMPS

HERE = Path(__file__).parent
EXAMPLE = Path("PACKAGES/yaff/mil53al")
"""Where LAMMPS keeps the data file, under its folder of examples."""

DEBIAN_EXAMPLES = Path("/usr/share/lammps/examples")
"""Where Debian's package lammps-examples puts them."""

# Elements of the eight atom types O_HY O_CA H_HY H_PH AL C_PH C_PC C_CA.
_ELEMENTS = ("O", "O", "H", "H", "Al", "C", "C", "C")
_STYLES = (
    "special_bonds lj 0.0 0.0 1.0 coul 1.0 1.0 1.0",
    "pair_style mm3/switch3/coulgauss/long 12.0 4.0",
    # Tables for the Coulomb part would make forces wrong by 1e-4 eV/Å.
    "pair_modify table 0 mix arithmetic tail no",
    "bond_style harmonic",
    "angle_style hybrid cosine/periodic cross harmonic cosine/squared",
    "dihedral_style fourier",
    "improper_style distharm",
)
_COMMANDS = ("kspace_style {kspace}", "neighbor 2.0 multi")


def quickff_mil53(
    examples: str | Path = DEBIAN_EXAMPLES, cell: str = "single", kspace: str = "ewald 1e-6", base: Path = HERE
) -> LAMMPS:
    """QuickFF for MIL-53(Al) through LAMMPS (units: eV, Å).

    The force field's data file is under the GPL and not part of this package: it is read from LAMMPS's examples
    (Debian: ``apt-get install lammps-examples``). It describes a double cell of 152 atoms, needed by the cutoff of
    12 Å; cells of 76 atoms are labelled as the half of their own exact repetition. ``quickff_mil53().structure()``
    is its structure (large pore) with the atoms in the order that labels need.

    Args:
        examples: the folder 'examples' of LAMMPS, or the folder with the example's lammps.data; relative to the
            settings file, beside which this module is.
        cell: 'single' (76 atoms) or 'double' (152 atoms).
        kspace: long-range solver and its relative accuracy.
        base: folder that ``examples`` is relative to.

    Raises:
        SettingsError: the data file is not there, or an argument is not known.
    """
    if cell not in ("single", "double"):
        raise SettingsError(f"reference.arguments.cell = {cell!r} is unknown; use 'single' or 'double'.")
    return LAMMPS(
        commands=[line.format(kspace=kspace) for line in _COMMANDS],
        elements=_ELEMENTS,
        units="real",
        atom_style="full",
        data=_data_file(Path(base) / examples),
        styles=_STYLES,
        repeat=(2, 1, 1) if cell == "single" else (1, 1, 1),
    )


def _data_file(examples: Path) -> Path:
    for folder in (examples, examples / EXAMPLE):
        if (folder / "lammps.data").is_file():
            return (folder / "lammps.data").resolve()
    raise SettingsError(
        f"There is no {EXAMPLE}/lammps.data in {examples}; install LAMMPS's examples (Debian: apt-get install "
        "lammps-examples) or set reference.arguments.examples to their folder."
    )
