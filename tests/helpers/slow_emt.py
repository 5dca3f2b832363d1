"""EMT that takes its time and notes every call."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ase.calculators.emt import EMT


class SlowEMT(EMT):
    """Takes ``seconds`` longer; lines ``begin`` and ``end`` with job and process go to ``log``, if there is one."""

    def __init__(self, seconds: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self._seconds = seconds

    def calculate(self, *arguments: Any, **options: Any) -> None:
        """As EMT."""
        self._note("begin")
        time.sleep(self._seconds)
        super().calculate(*arguments, **options)
        self._note("end")

    @staticmethod
    def _note(what: str) -> None:
        with Path(os.environ["CALLS"]).open("a") as log:
            log.write(f"{what} {os.environ.get('SLURM_JOB_ID')} {os.environ.get('SLURMD_NODENAME')} {os.getpid()}\n")
