"""Rows of a benchmark's table: python ../rows.py reduced.toml [ROW ...] [--seeds 0 1 2] [--at-once 2] [--list]

A row is one run per seed with the settings file and the changes that rows.toml, beside it, lists for the row. Each run
has a folder, rows_run/reduced/ROW_seed0 and so on, and a log in rows_run/reduced/logs. What is finished is skipped,
what was interrupted goes on, a run that fails doesn't stop the others. Files that the settings name and that rows.toml
knows how to make (test sets, start structures) are made first. Without row names: all rows of this settings file, in
the order of rows.toml.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ubmd.settings import RunSettings, load_settings


@dataclass(frozen=True)
class Run:
    """One run of a row: where it goes, and what it changes in the settings file."""

    folder: Path
    changes: tuple[str, ...]

    def settings(self, file: Path) -> RunSettings:
        """All its settings; SettingsError if they are not valid."""
        return load_settings(file, RunSettings, self.changes)

    def is_finished(self) -> bool:
        """Whether a stop rule has ended it."""
        history = self.folder / "history.json"
        return history.exists() and bool(json.loads(history.read_text())[-1].get("ended"))


def read_rows(file: Path) -> dict[str, tuple[str, ...]]:
    """Rows of this settings file -> their changes, from the rows.toml beside it, which explains its keys."""
    rows = tomllib.loads(file.with_name("rows.toml").read_text())["rows"]
    return {
        name: (*row.get("set", ()), *row.get("only", {}).get(file.stem, ()))
        for name, row in rows.items()
        if file.stem in row.get("files", (file.stem,))
    }


def runs_of(file: Path, names: Sequence[str], seeds: Sequence[int], folder: Path, more: Sequence[str]) -> list[Run]:
    """Runs of these rows: all rows with the first seed come first, so that a stopped driver leaves whole tables."""
    rows, runs = read_rows(file), []
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise SystemExit(
            f"{file.with_name('rows.toml')} has no row {unknown[0]!r} for {file.name}, only {', '.join(rows)}."
        )
    for seed in seeds:
        for name in names or rows:
            run_dir = folder / f"{name}_seed{seed}"
            runs.append(Run(run_dir, (*rows[name], *more, f"seed={seed}", f"run_dir={json.dumps(str(run_dir))}")))
    return runs


def prepare(file: Path, runs: Sequence[Run]) -> None:
    """Make the files that the runs need and rows.toml has a command for."""
    commands = tomllib.loads(file.with_name("rows.toml").read_text()).get("prepare", {})
    settings = [run.settings(file) for run in runs]
    needed = {str(path) for s in settings for path in (s.start.file, s.test.file if s.test else None) if path}
    for name in sorted(needed & commands.keys()):
        if not (file.parent / name).exists():
            script, *words = commands[name]
            print(f"--- {name}: {script} {' '.join(words)}", flush=True)
            subprocess.run([sys.executable, str(file.parent / script), *words], check=True)


def execute(file: Path, run: Run) -> bool:
    """Start or resume one run; whether it is finished now. Its output is appended to the log."""
    name, shown = run.folder.name, f"{run.folder.parent.name}/{run.folder.name}"
    if run.is_finished():
        print(f"{shown}: finished before", flush=True)
        return True
    begin = time.monotonic()
    ubmd = Path(sys.executable).with_name("ubmd")
    words = [word for change in run.changes for word in ("--set", change)]
    logs = run.folder.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{name}.log").open("a") as log:
        code = subprocess.run([str(ubmd), "run", str(file), *words], stdout=log, stderr=log, check=False).returncode
    said = "finished" if code == 0 else f"failed, see {log.name}"
    print(f"{shown}: {said} after {(time.monotonic() - begin) / 60:.1f} min", flush=True)
    return code == 0


def main() -> int:
    """Run what is missing; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="settings file with a rows.toml beside it")
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="for the runs (default: rows_run/NAME_OF_THE_SETTINGS)")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs at the same time, one core each")
    parser.add_argument("--set", dest="more", action="append", default=[], help="change a setting in all runs")
    parser.add_argument("--list", action="store_true", help="show what would be run, and where it stands")
    options = parser.parse_args()
    file = options.settings.resolve()
    folder = (options.folder or Path("rows_run") / file.stem).resolve()
    runs = runs_of(file, options.rows, options.seeds, folder, options.more)
    if options.list:
        for run in runs:
            state = "finished" if run.is_finished() else "begun" if run.folder.exists() else "to do"
            print(f"{run.folder.name:32} {state:10} {' '.join(run.changes[:-2])}")
        return 0
    prepare(file, runs)
    with ThreadPoolExecutor(options.at_once) as pool:
        done = list(pool.map(lambda run: execute(file, run), runs))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
