"""Processor time of a run by iteration and stage, while it is going on: python processor_time.py RUN_DIR FILE.json

Follows RUN_DIR/events.jsonl, which names the driver's process and its stages, and adds up the processor time of the
driver and everything that it starts (also MACE's own Python) twice a second: what a shared machine's clock cannot tell.
An interrupted and resumed run is followed on. If FILE.json exists, what processes have used before is left out.
Linux only. FILE.json: {"train": {"0": seconds, "1": seconds, ...}, "md": ..., "other": ...}
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PERIOD = 0.5  # s


def processes() -> dict[int, tuple[int, str, float]]:
    """Process -> its parent, its time of start (numbers are used again), processor time in s."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found[int(path.parent.name)] = int(fields[1]), fields[19], (int(fields[11]) + int(fields[12])) / TICKS
    return found


def family(driver: int) -> dict[tuple[int, str], float]:
    """(process, start) -> processor time, of the driver and all that it has started."""
    table = processes()
    children: dict[int, list[int]] = {}
    for number, (parent, _, _) in table.items():
        children.setdefault(parent, []).append(number)
    found, waiting = {}, [driver]
    while waiting:
        number = waiting.pop()
        waiting += children.get(number, [])
        if number in table:
            _, start, seconds = table[number]
            found[number, start] = seconds
    return found


def state(events: Path) -> tuple[int, str, int, bool]:
    """The driver's process, its stage and iteration, and whether the run has ended."""
    driver, stage, iteration, ended = 0, "other", 0, False
    for line in events.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # being written
            continue
        iteration = event.get("iteration", iteration)
        if event["event"] == "run_started":
            driver, stage, ended = event["process"], "other", False
        elif event["event"] == "stage_started":
            stage = event["stage"]
        elif event["event"] == "stage_done":
            stage = "other"
        ended = ended or event["event"] == "run_done"
    return driver, stage, iteration, ended


def main() -> None:
    """Follow the run until it ends."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    events, target = Path(sys.argv[1]) / "events.jsonl", Path(sys.argv[2])
    times: dict[str, dict[str, float]] = json.loads(target.read_text()) if target.exists() else {}
    seen: dict[tuple[int, str], float] = {}
    known = not times
    ended = False
    while not ended:
        time.sleep(PERIOD)
        if not events.exists():
            continue
        driver, stage, iteration, ended = state(events)
        now = family(driver) if driver else {}
        if not known:
            known, seen = True, now
        row = times.setdefault(stage, {})
        row[str(iteration)] = row.get(str(iteration), 0.0) + sum(
            seconds - seen.get(key, 0.0) for key, seconds in now.items()
        )
        seen |= now
        target.write_text(json.dumps(times, indent=1))


if __name__ == "__main__":
    main()
