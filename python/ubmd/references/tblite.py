"""Tight binding (GFN-xTB) with the tblite library, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.data.periodicity import is_partly_periodic
from ubmd.errors import LabelError, SettingsError
from ubmd.references.electrons import spin_multiplicity, total_charge
from ubmd.references.programs import ProgramCalculator

METHODS = ("GFN1-xTB", "GFN2-xTB", "IPEA1-xTB")


def tblite(
    method: str = "GFN1-xTB",
    accuracy: float = 0.1,
    charge: float | None = None,
    multiplicity: int | None = None,
    **settings: Any,
) -> ProgramCalculator:
    """GFN-xTB for molecules and periodic cells (Γ only): energy in eV, forces in eV/Å, stress in eV/Å^3.

    tblite starts the SCF from the last structure's solution, which moves forces by up to 1e-4 eV/Å at its default
    accuracy and makes labels depend on each other. Here each label starts from scratch, with a tighter threshold. An
    SCF that does not converge is an error, so that the label is rejected. OpenMP threads: OMP_NUM_THREADS, 1 in a
    worker unless reference.environment says otherwise.

    Args:
        method: 'GFN1-xTB', 'GFN2-xTB' or 'IPEA1-xTB'.
        accuracy: SCF threshold relative to tblite's default of 1; 0.1 leaves 1e-5 eV/Å in forces.
        charge: total charge, e; default: that of the structure (``info['charge']`` or the sum of initial charges).
        multiplicity: 2 S + 1; default: that of the structure (``info['multiplicity']`` or the initial moments), or the
            lowest.
        settings: further keywords of tblite's ASE calculator (electronic_temperature, max_iterations ...).

    Raises:
        ImportError: tblite is not installed.
        SettingsError: unknown method.

    Slabs and wires are refused: tblite (0.4) repeats them along their free vectors as well.
    """
    from tblite.ase import TBLite

    if method not in METHODS:
        raise SettingsError(f"reference.arguments.method = {method!r} is unknown; use {', '.join(METHODS)}.")

    def run(atoms: Atoms, _: Path) -> dict[str, Any]:
        if is_partly_periodic(atoms):
            raise LabelError(
                "tblite takes a structure that is periodic in some directions as periodic in all: make its pbc all "
                "true, with a wide gap between the copies, or use another reference."
            )
        electrons: dict[str, Any] = {
            "charge": total_charge(atoms, charge),
            "multiplicity": spin_multiplicity(atoms, multiplicity),
        }
        calculator = TBLite(method=method, accuracy=accuracy, **({"verbosity": 0} | electrons | settings))
        calculator.calculate(atoms)
        return dict(calculator.results)

    return ProgramCalculator(run)
