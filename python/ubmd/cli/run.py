"""Commands of the loop: init, check, run, status, report, compare; and doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ubmd.errors import SettingsError
from ubmd.files import check_outputs, write_text
from ubmd.settings import RunSettings, load_settings
from ubmd.settings.dynamic import DynamicRunSettings, is_dynamic

SettingsFile = Annotated[Path, typer.Argument(help="Settings file (TOML).", show_default=False)]
RunDir = Annotated[Path, typer.Argument(help="Folder of the run (run_dir of its settings).", show_default=False)]
Override = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: --set loop.labels=64. May be repeated.")
]

RunModels = Annotated[
    bool,
    typer.Option(
        "--run-models",
        help="Run the model files in a folder that lacks what its models say (one of an earlier version): only for "
        "folders that you trust.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for function in (init, check, run, status, report, compare, doctor):
        app.command()(function)


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("settings.toml"),
    short: Annotated[bool, typer.Option("--short", help="Only the keys that most people set.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="For dynamic training of a crystal's potential.")] = False,
) -> None:
    """Write a settings file in which every key is explained."""
    from ubmd.cli.template import dynamic_template, run_template, short_template

    if short and dynamic:
        raise SettingsError("--short is for active-learning loops; leave it out with --dynamic.")

    if path.exists():
        raise SettingsError(f"{path} is already there; name another file.")
    if not path.parent.is_dir():
        raise SettingsError(f"There is no folder {path.parent}; make it, or name another file.")
    check_outputs(path.parent, [], "FILE")
    template = dynamic_template if dynamic else short_template if short else run_template
    write_text(path, template(path.name))
    what = "crystal" if dynamic else "start.file"
    print(f"Wrote {path}. Set run_dir, {what} and the reference, then: ubmd check {path}")


def check(settings: SettingsFile, override: Override = None) -> None:
    """Say what would be run, then do every stage once, in miniature: finds mistakes in a minute.

    For dynamic training (settings with a \\[dynamic] table) only the first.

    Labels two structures, trains a few epochs, runs ten biased MD steps, selects and labels one more. From this it
    tells roughly how long the whole run would take and how much it would write. It works in a hidden folder beside
    run_dir, which is kept until the next check if a stage fails.
    """
    if is_dynamic(settings):
        _check_dynamic(settings, override or [])
        return
    values = load_settings(settings, RunSettings, override or [])
    from ubmd.learning.loop.check import check as check_settings

    for line in check_settings(values, settings.parent):
        print(line, flush=True)
    print(f"All stages work. Start with: ubmd run {settings}")


def run(
    settings: SettingsFile,
    override: Override = None,
    from_iteration: Annotated[
        int | None,
        typer.Option(
            "--from",
            metavar="ITERATION",
            min=0,
            help="Take the run back to this iteration, perhaps with changed settings; labels from before stay, later "
            "ones go to the folder 'aside'. Resume without it.",
        ),
    ] = None,
) -> None:
    """Start or resume an active-learning run.

    Labels perturbed start structures; then again and again: trains, calibrates the uncertainty, runs biased MD replicas
    in LAMMPS, selects the most informative frames, labels them. Kill it whenever you like: the same command goes on
    where it was. A finished run with a larger loop.labels goes on, too.

    With a \\[dynamic] table in the settings: dynamic training. MD with the current potential asks for a label when its
    predicted error is too large, learns it, and goes on.
    """
    if is_dynamic(settings):
        if from_iteration is not None:
            raise SettingsError("--from works for active-learning loops; a dynamic run goes on, or starts anew.")
        _run_dynamic(settings, override or [])
        return
    values = load_settings(settings, RunSettings, override or [])
    # After the settings: a mistake there shows at once, these take seconds.
    from rich.console import Console

    from ubmd.cli.loop_progress import make_progress
    from ubmd.learning.loop.loop import run as run_loop
    from ubmd.learning.loop.timeline import Timeline
    from ubmd.learning.loop.verify import verify
    from ubmd.runs.folder import RunFolder

    verify(values, settings.parent, _remark)
    timeline = Timeline(values, RunFolder(values.run_dir).read_events())
    with make_progress(Console(), timeline) as progress:
        folder = run_loop(values, settings.parent, progress, from_iteration=from_iteration)
    print(f"Model: {folder / 'model.pt'}\nReport: {folder / 'report' / 'report.html'}")


def _remark(sentence: str) -> None:
    """A remark on labels that may be a mistake."""
    print(f"Remark: {sentence}", file=sys.stderr)


def _check_dynamic(settings: Path, override: list[str]) -> None:
    """Say what a dynamic run would do."""
    values = load_settings(settings, DynamicRunSettings, override)
    from ubmd.learning.dynamic.check import check as check_dynamic

    for line in check_dynamic(values, settings.parent):
        print(line, flush=True)
    print(f"Start with: ubmd run {settings}")


def _run_dynamic(settings: Path, override: list[str]) -> None:
    """Start or resume a dynamic run."""
    values = load_settings(settings, DynamicRunSettings, override)
    from rich.console import Console

    from ubmd.cli.dynamic_progress import make_progress
    from ubmd.learning.dynamic.engine import run as run_engine
    from ubmd.learning.dynamic.timeline import DynamicTimeline
    from ubmd.learning.held_out import given_test_set
    from ubmd.runs.folder import RunFolder

    given_test_set(values.test, settings.parent, _remark)

    timeline = DynamicTimeline(values, RunFolder(values.run_dir).read_events())
    with make_progress(Console(), timeline) as progress:
        folder = run_engine(values, settings.parent, progress)
    print(f"Model: {folder / 'model.pt'}\nReport: {folder / 'report' / 'report.html'}")


def status(run_dir: RunDir) -> None:
    """Show where a run stands."""
    from ubmd.cli.console import make_console
    from ubmd.runs.folder import RunFolder
    from ubmd.runs.manifest import is_dynamic_run

    if is_dynamic_run(RunFolder(run_dir)):
        from ubmd.cli.dynamic_status import status as describe_dynamic_run

        make_console().print(describe_dynamic_run(run_dir))
        return
    from ubmd.cli.loop_status import status as describe_run

    make_console().print(describe_run(run_dir))


def report(run_dir: RunDir, run_models: RunModels = False) -> None:
    """Make the report of a run, also of an unfinished one: one HTML page with all tables and pictures.

    Learning curves, model against reference, uncertainty against error, what was explored, how replicas ended, rejected
    labels, time per stage, settings and versions. The same as report.md, with the pictures as PNG files, for papers.
    """
    from ubmd.runs.folder import RunFolder
    from ubmd.runs.manifest import is_dynamic_run

    if RunFolder(run_dir).manifest.exists():  # else there is no run to report
        check_outputs(RunFolder(run_dir).report, [], "report")
    if is_dynamic_run(RunFolder(run_dir)):
        from ubmd.analysis.dynamic_report import make_dynamic_report

        print(f"Report: {make_dynamic_report(run_dir)[-1]}")
        return
    from ubmd.analysis.report import make_report

    print(f"Report: {make_report(run_dir, run_models)[-1]}")


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the comparison.")] = Path("comparison"),
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Name of a group, in order of the runs; may be repeated.")
    ] = None,
    run_models: RunModels = False,
) -> None:
    """Compare runs: errors against labels and MD steps, what was explored, calibration.

    Runs that differ in their seed only are one group, shown as mean and standard deviation.
    """
    from rich.markup import escape
    from rich.table import Table

    from ubmd.analysis.compare import compare as compare_runs
    from ubmd.cli.console import make_console

    check_outputs(out, [], "--out")
    rows, files = compare_runs(run_dirs, out, name, run_models)
    table = Table(caption="mean ± standard deviation over the runs of a group")
    table.add_column("")
    for group in rows[0].values:
        table.add_column(escape(group), justify="right")
    for row in rows:
        table.add_row(row.title, *row.cells())
    make_console().print(table)
    page = next(path for path in files if path.suffix == ".html")
    print(f"Tables and pictures: {page}")


def doctor() -> None:
    """Check the installation link by link: package, plugin, MPI, torch, LAMMPS, one biased MD step."""
    from ubmd.lammps.doctor import diagnose

    findings = diagnose()
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.check}: {finding.sentence}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)
