"""A driver that kills itself with SIGKILL when it hears a chosen event: the run's public listener, nothing inside it.

Arguments: settings file, folder for notes, event as JSON (the keys that must match), how many matches to let pass.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from ubmd.runs.schedules import schedule_of_file
from ubmd.settings import load_settings


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

    schedule = schedule_of_file(settings)
    schedule.run(load_settings(settings, schedule.settings), settings.parent, listen)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
