"""A driver that kills itself with SIGKILL when it hears a chosen event: the run's public listener, nothing inside it.

Arguments: settings file, folder for notes, event as JSON (the keys that must match), how many matches to let pass.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from ubmd.learning import RunFolder
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


def start_driver(settings: Path, wanted: dict, passes: int) -> int:
    """Run the driver that kills itself; returns its exit status."""
    command = [sys.executable, __file__, settings, settings.parent, json.dumps(wanted), str(passes)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300, check=False).returncode


def tear(folder: RunFolder) -> None:
    """Leave the beginnings of a line and a frame behind, as a kill in the middle of a write does."""
    with folder.events.open("a") as handle:
        handle.write('{"time": "2026-')
    if json.loads(last_line(folder)).get("event") == "label_appended":
        with folder.dataset.open("a") as handle:
            handle.write("13\nProperties=species:S:1:pos:R:3 ener")


def last_line(folder: RunFolder) -> str:
    return folder.events.read_text().splitlines()[-2]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
