"""A reference calculator that notes on disk what it is asked: ASE's EMT, named in settings as ``counted:Counted``.

Lies beside the settings of the golden runs. Environment: ``COUNTED_LOG``, file that gets one line per structure;
``COUNTED_SECONDS``, how much longer each call takes.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

from ase import Atoms
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT


class Counted(EMT):
    """EMT that appends `place` of every structure that it is asked for to a file."""

    def calculate(
        self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = tuple(all_changes)
    ) -> None:
        """As EMT, whatever was computed before: its neighbour lists would decide the last digits.

        The line is on disk before the computation begins.
        """
        assert atoms is not None
        if "COUNTED_LOG" in os.environ:
            with open(os.environ["COUNTED_LOG"], "a") as log:  # noqa: PTH123 (one write of one line)
                log.write(place(atoms) + "\n")
        time.sleep(float(os.environ.get("COUNTED_SECONDS", "0")))
        super().calculate(atoms, properties, all_changes)


def place(atoms: Atoms) -> str:
    """Hash of elements, positions and cell, to the last bit."""
    parts = (atoms.numbers.astype("<i8"), atoms.positions.astype("<f8"), atoms.cell.array.astype("<f8"))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
