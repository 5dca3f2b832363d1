"""The active-learning loop: train, run biased replicas, select, label, repeat.

``run`` is the loop, ``Workers`` the processes it uses, ``RunFolder`` where it keeps everything.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "RunFolder": "ubmd.runs.folder",
    "Workers": "ubmd.learning.work.workers",
    "check": "ubmd.learning.loop.check",
    "run": "ubmd.learning.loop.loop",
}

__all__ = ["RunFolder", "Workers", "check", "run"]


def __getattr__(name: str) -> Any:
    # Worker processes import their tasks from here: they must not pay for torch.
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ubmd.learning' has no attribute '{name}'")
