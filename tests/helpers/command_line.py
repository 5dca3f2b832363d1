"""The command `ubmd` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

UBMD = [sys.executable, "-c", "from ubmd.cli.main import app; app()"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def ubmd(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever that is."""
    command = [*UBMD, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
