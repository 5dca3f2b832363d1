"""The panel: strategies of active learning on several systems, at equal labels and with paired seeds.

  python panel.py run     [--systems S ...] [--strategies S ...] [--seeds 0 1 2 3 4] [--at-once 2] [--folder FOLDER]
  python panel.py table   [--systems S ...] [--strategies S ...] [--folder FOLDER | --results FILE] [--keep FILE]

'run' starts what is missing, resumes what was interrupted, and writes the figures of every finished run to
FOLDER/figures/SYSTEM/STRATEGY_seedN.json; the run's folder, FOLDER/SYSTEM/STRATEGY_seedN, may be deleted then. All
strategies and systems with the first seed come first. 'table' prints Markdown from these files, or from one file that
--keep has made of them (.json or .json.xz). What the columns mean: README.md. Strategies: rows.toml.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from figures import figures_of
from tables import BASE, tables

from ubmd.errors import UbmdError
from ubmd.files import write_json

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from rows import Run, execute, prepare, read_rows, runs_of  # noqa: E402 (beside the examples, not a package)

DEVELOPMENT, FINAL = ("molecule", "slab", "crystal"), ("ethanol", "water")
Results = dict[str, dict[str, dict[str, Any]]]
"""system -> strategy -> seed -> figures of a run"""


def settings_file(system: str) -> Path:
    """Settings of a system."""
    return HERE / f"{system}.toml"


def figures_file(folder: Path, run: Run) -> Path:
    """Where the figures of a run are kept."""
    return folder / "figures" / run.folder.parent.name / f"{run.folder.name}.json"


def all_runs(options: argparse.Namespace) -> list[tuple[Path, Run]]:
    """(settings file, run) of everything that was asked for, in the order in which it is started."""
    return [
        (settings_file(system), run)
        for seed in options.seeds
        for system in options.systems
        for run in runs_of(settings_file(system), options.strategies, [seed], options.folder / system, options.more)
    ]


def carry_out(file: Path, run: Run, folder: Path, tidy: bool) -> bool:
    """Run, then keep its figures; whether they are there now."""
    kept = figures_file(folder, run)
    if kept.exists():
        return True
    if not execute(file, run):
        return False
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, rounded(figures_of(run.folder) | {"changes": list(run.changes[:-2])}))
    except UbmdError as error:
        print(f"{run.folder.name}: {error}", flush=True)
        return False
    if tidy:
        shutil.rmtree(run.folder)
    return True


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """With six digits: files of many runs stay small."""
    short: dict[str, Any] = json.loads(json.dumps(figures), parse_float=lambda text: float(f"{float(text):.6g}"))
    return short


def run_all(options: argparse.Namespace) -> int:
    """Make the test sets that are missing, then the runs; 1 if one failed."""
    runs = all_runs(options)
    if options.list:
        for _, run in runs:
            state = "finished" if figures_file(options.folder, run).exists() else "to do"
            print(f"{run.folder.parent.name:10} {run.folder.name:24} {state:10} {' '.join(run.changes[:-2])}")
        return 0
    for system in options.systems:
        prepare(settings_file(system), [run for file, run in runs if file.stem == system])
    with ThreadPoolExecutor(options.at_once) as pool:
        done = list(pool.map(lambda pair: carry_out(*pair, options.folder, options.tidy), runs))
    return 0 if all(done) else 1


def read_results(folder: Path) -> Results:
    """Figures of all finished runs in a folder."""
    found: Results = {}
    for path in sorted((folder / "figures").glob("*/*_seed*.json")):
        strategy, _, seed = path.stem.rpartition("_seed")
        found.setdefault(path.parent.name, {}).setdefault(strategy, {})[seed] = json.loads(path.read_text())
    return found


def chosen(results: Results, systems: Iterable[str], strategies: Sequence[str]) -> Results:
    """The part that was asked for, in the order of rows.toml; strategies that it no longer has come last."""
    part: Results = {}
    for system in systems:
        have = results.get(system, {})
        order = strategies or [*read_rows(settings_file(system)), *have]
        if have:
            part[system] = {name: have[name] for name in dict.fromkeys(order) if name in have}
    return part


def load(path: Path) -> Results:
    """Results from a file, compressed or not."""
    data = path.read_bytes()
    found: Results = json.loads(lzma.decompress(data) if path.suffix == ".xz" else data)
    return found


def keep(path: Path, results: Results) -> None:
    """All results in one file, compressed if its name ends in .xz."""
    data = json.dumps(results).encode()
    path.write_bytes(lzma.compress(data, preset=9) if path.suffix == ".xz" else data)


def print_tables(options: argparse.Namespace) -> int:
    """Markdown to the screen, and one file of everything with --keep; 1 if there is nothing to compare."""
    results = load(options.results) if options.results else read_results(options.folder)
    if options.keep:
        keep(options.keep, results)
    part = chosen(results, options.systems, options.strategies)
    if not any(BASE in strategies for strategies in part.values()):
        print(f"There are no finished runs of {BASE!r} on these systems: run them first (python panel.py run).")
        return 1
    print("\n".join(tables(part)))
    return 0


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run, table = commands.add_parser("run"), commands.add_parser("table")
    for command in (run, table):
        command.add_argument("--systems", nargs="+", choices=(*DEVELOPMENT, *FINAL), default=DEVELOPMENT)
        command.add_argument("--strategies", nargs="+", default=[], help="default: all of rows.toml")
        command.add_argument("--folder", type=Path, default=Path("panel_run"), help="for runs and figures")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    run.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="runs at the same time, one core each")
    run.add_argument("--set", dest="more", action="append", default=[], help="change a setting in all runs")
    run.add_argument("--tidy", action="store_true", help="delete the folder of a run once its figures are kept")
    run.add_argument("--list", action="store_true", help="show what would be run, and what is finished")
    table.add_argument("--results", type=Path, help="file of --keep to read instead of --folder")
    table.add_argument("--keep", type=Path, help="file to keep the figures of all runs in, e.g. results.json.xz")
    options = parser.parse_args(words)
    options.folder = options.folder.expanduser().resolve()
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Run or print; 1 if something is missing."""
    options = options_of(words)
    return run_all(options) if options.command == "run" else print_tables(options)


if __name__ == "__main__":
    sys.exit(main())
