"""What `ubmd status` says about a loop: read from the run folder, also while another process works in it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ubmd.attempts import steps_so_far, targets_in_work
from ubmd.cli.run_status import (
    SHOWN,
    Row,
    brief_state,
    cell,
    describe_idle,
    errors_in_row,
    make_table,
    page,
    since,
)
from ubmd.learning.loop.timeline import Timeline, describe_work
from ubmd.runs.confidence import confidence
from ubmd.runs.folder import RunFolder
from ubmd.runs.manifest import read_settings
from ubmd.runs.reading import read_events, read_iterations
from ubmd.runs.records import IterationEntry, SetName
from ubmd.runs.stage_names import stage_name
from ubmd.settings import RunSettings
from ubmd.texts import duration, to_go

_QUIET = 1800.0  # s without any output, after which the status mentions it
_ENDINGS = {"threshold": "thr", "step limit": "lim", "desorbed": "des", "failed": "fail"}
_LEGEND = (
    "ended: replicas that passed the threshold (thr), reached the step limit (lim), desorbed something (des), or "
    "failed; train, MD, label: wall time."
)


def status(run_dir: Path) -> RenderableType:
    """State, running stages with estimates, replicas, and one table of the iterations of a run.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings, history = read_settings(folder), read_iterations(folder, newest=SHOWN)
    timeline = Timeline(settings, read_events(folder))
    running = folder.is_locked()
    lines = [_labels(timeline, folder), *(_now(folder, timeline, settings) if running else ())]
    below: list[RenderableType] = [_table(folder, history), Text(_LEGEND)] if history else []
    below += [Text(sentence) for sentence in confidence(history, settings)]
    return page(folder, _state(folder, timeline, running), lines, timeline.lost, below)


def row(run_dir: Path) -> Row:
    """The same in one row of a table of several runs.

    Raises:
        DataError: the folder holds no run.
    """
    folder = RunFolder(run_dir)
    settings, history = read_settings(folder), read_iterations(folder, newest=1)
    timeline, running = Timeline(settings, read_events(folder)), folder.is_locked()
    last = history[-1] if history else None
    found: dict[SetName, str] = {}
    for name in ("valid", "test"):
        errors = last.errors_on(name) if last else None
        found[name] = errors_in_row(*errors.rmse[:2], errors.structures) if errors else ""
    seconds = timeline.run_left() if running else None
    return Row(
        run=str(run_dir),
        state=brief_state(timeline, running),
        turn=str(timeline.iteration) if timeline.iteration >= 0 else "",
        labels=f"{timeline.labels} of {timeline.wanted}",
        valid=found["valid"],
        test=found["test"],
        left="" if seconds is None else f"about {duration(seconds)}",
    )


def _state(folder: RunFolder, timeline: Timeline, running: bool) -> str:
    """One sentence: running, finished, ended with an error, or dead."""
    if running:
        quiet = _seconds_since_life(folder)
        if quiet > _QUIET:
            return f"running, but nothing was written for {duration(quiet)}"
        return "running"
    doing = f" in the stage '{', '.join(timeline.running)}'" if timeline.running else ""
    return describe_idle(timeline, doing)


def _seconds_since_life(folder: RunFolder) -> float:
    """Time since anything in the folder was written: an event, an epoch, steps of a replica, a label."""
    newest = folder.iterations()[-1:]
    paths = [folder.events, *folder.path.glob("test/*"), *folder.path.glob("start/*")]
    paths += [path for iteration in newest for path in (*iteration.glob("*"), *iteration.glob("*/*"))]
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return max(0.0, datetime.now(UTC).timestamp() - max(times, default=0.0))


def _labels(timeline: Timeline, folder: RunFolder) -> str:
    # Events come at once, the file when a batch is complete; it also has labels that were rejected later.
    rejected = max(timeline.rejected, _rejected(folder).total())
    return f"{timeline.labels} of {timeline.wanted} labels, {rejected} rejected."


# ------------------------------------------------------------------------------------------ now


def _now(folder: RunFolder, timeline: Timeline, settings: RunSettings) -> list[str]:
    """Running stages with their work and estimates."""
    iteration = folder.iteration(timeline.iteration) if timeline.iteration >= 0 else folder.path
    lines = []
    replicas = _replica_steps(iteration)
    for stage, begin in timeline.running.items():
        work = _work(stage, iteration, replicas, settings, timeline.epochs(timeline.iteration))
        if work is not None:
            timeline.work[stage] = work
        where = f"Iteration {timeline.iteration}" if timeline.iteration >= 0 else "Start"
        parts = [f"{where}, {stage_name(stage)} {since(begin)}", describe_work(stage, work)]
        parts.append(to_go(timeline.stage_left(stage)))
        lines.append("; ".join(part for part in parts if part) + ".")
        if stage == "md":
            lines += [f"  replica {k}: {steps} of {settings.md.steps} steps" for k, steps in replicas.items()]
    seconds = timeline.run_left()
    if seconds is not None:
        lines.append(f"The run: about {duration(seconds)} to go.")
    return lines


def _work(
    stage: str, folder: Path, replicas: dict[int, int], settings: RunSettings, epochs: int
) -> tuple[int, int] | None:
    """(done, all) of a running stage, from the files that it writes."""
    if stage == "md":
        ended = {int(path.stem[-3:]) for path in folder.glob("replica_*.json")} - set(replicas)
        total = (settings.md.replicas - len(ended)) * settings.md.steps
        return sum(replicas.values()), max(total, 1)
    if stage == "label":
        batch = folder / ("labels" if folder.name.startswith("iter_") else "start")
        done = [*batch.glob("label_*.extxyz"), *batch.glob("rejected_*.json")]
        return len(done), len(list(batch.glob("candidate_*.extxyz")))
    if stage == "train":
        logs = sorted(folder.glob("train/**/log.csv"), key=os.path.getmtime)
        if logs:
            rows = logs[-1].read_text().splitlines()
            found = re.match(r"\d+", rows[-1]) if len(rows) > 1 else None
            return (int(found[0]), epochs) if found else None
    return None


def _replica_steps(folder: Path) -> dict[int, int]:
    """Steps of the replicas that are running."""
    targets = [folder / name for name in targets_in_work(folder) if name.startswith("frames_")]
    found = {int(target.name.removeprefix("frames_")): steps_so_far(target) for target in targets}
    return {replica: steps for replica, steps in found.items() if steps is not None}


# ------------------------------------------------------------------------------------------ table


def _table(folder: RunFolder, history: Sequence[IterationEntry]) -> Table:
    """One row per iteration."""
    rejected = _rejected(folder)
    tested = any(entry.test for entry in history)  # then errors on validation labels add nothing
    errors = [entry.rmse_on("test") for entry in history]
    columns = {
        "iter": [str(entry.iteration) for entry in history],
        "labels": [str(entry.labels) for entry in history],
        "rej.": [str(rejected[entry.iteration] or "") for entry in history],
        "MD\nsteps": [str(entry.md_steps) for entry in history],
        "valid F\neV/Å": [cell(entry.rmse_on("valid")[1], ".3f") for entry in history if not tested],
        "valid\nstruct.": [_behind(entry, "valid") for entry in history if not tested],
        "test E\nmeV/atom": [cell(energy, ".2f") for energy, _, _ in errors],
        "test F\neV/Å": [cell(force, ".3f") for _, force, _ in errors],
        "test S\nMPa": [cell(stress, ".1f") for _, _, stress in errors],
        "test\nstruct.": [_behind(entry, "test") for entry in history],
        "max u\neV/Å": [cell(entry.max_u, ".2f") for entry in history],
        "cov.": [cell(entry.coverage, ".3f") for entry in history],
        "volume\nÅ³/atom": [_volumes(folder.iteration(entry.iteration)) for entry in history],
        "ended": [_endings(entry) for entry in history],
        "train": [_seconds(entry, "train") for entry in history],
        "MD": [_seconds(entry, "md") for entry in history],
        "label": [_seconds(entry, "label") for entry in history],
    }
    return make_table(columns)


def _behind(entry: IterationEntry, name: SetName) -> str:
    """Number of structures that errors were measured on."""
    errors = entry.errors_on(name)
    return str(errors.structures) if errors and errors.structures else ""


def _rejected(folder: RunFolder) -> Counter[int]:
    """Iteration -> structures without a label, from the file that keeps them."""
    text = folder.rejected.read_text() if folder.rejected.exists() else ""
    return Counter(int(found) for found in re.findall(r"\biteration=(-?\d+)", text))


def _endings(entry: IterationEntry) -> str:
    """'5 thr 3 lim': how the replicas ended."""
    counts = Counter[str](result.stopped for result in entry.replicas)
    return " ".join(f"{counts[name]} {short}" for name, short in _ENDINGS.items() if counts[name])


def _seconds(entry: IterationEntry, stage: str) -> str:
    seconds = entry.seconds.get(stage)
    return "-" if seconds is None else duration(seconds)


def _volumes(folder: Path) -> str:
    """Range of the cell's volume per atom in the frames of an iteration, if it changes."""
    found: list[float] = []
    for path in folder.glob("frames_*.extxyz"):
        with path.open("rb") as handle:
            size = handle.readline()
            handle.seek(0)
            lattices = re.findall(rb'Lattice="([^"]+)"', handle.read())
        found += [_volume(text) / int(size) for text in lattices]
    if not found or max(found) - min(found) < 1e-6 * max(found):
        return ""
    return f"{min(found):.2f}-{max(found):.2f}"


def _volume(lattice: bytes) -> float:
    a, b, c = (tuple(map(float, lattice.split()[k : k + 3])) for k in (0, 3, 6))
    cross = (a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0])
    return abs(sum(x * y for x, y in zip(cross, c, strict=True)))
