"""A driver that kills itself with SIGKILL when it hears a chosen event: the run's public listener, nothing inside it.

Arguments: settings file, folder for notes, event as JSON (the keys that must match), how many matches to let pass.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from ubmd.learning import run
from ubmd.learning.dynamic.engine import run as run_dynamic
from ubmd.settings import RunSettings, load_settings
from ubmd.settings.dynamic import DynamicRunSettings, is_dynamic


def main(settings: Path, notes: Path, wanted: dict, passes: int) -> None:
    left = passes

    def listen(event: dict) -> None:
        nonlocal left
        if all(event.get(key) == value for key, value in wanted.items()):
            if left == 0:
                children = [p.read_text() for p in Path("/proc/self/task").glob("*/children")]
                (notes / "children").write_text(" ".join(children))
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    if is_dynamic(settings):
        run_dynamic(load_settings(settings, DynamicRunSettings), settings.parent, listen)
    else:
        run(load_settings(settings, RunSettings), settings.parent, listen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
