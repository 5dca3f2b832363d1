"""Looking at processes, and where the helpers are that other processes import."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent  # for the path of processes that do not inherit ours
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc, needs PR_SET_PDEATHSIG")


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def descendants(process: int) -> list[int]:
    """A process's children, their children and so on."""
    children = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            children += [int(number) for number in path.read_text().split()]
    return children + [d for child in children for d in descendants(child)]
