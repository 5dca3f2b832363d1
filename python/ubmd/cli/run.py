"""Commands of the loop: check, run, status, report, compare; and doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ubmd.cli.completion import keys_of_runs
from ubmd.cli.labels import LabelOption, label_overrides
from ubmd.errors import SettingsError
from ubmd.files import check_outputs
from ubmd.runs.folder import RunFolder
from ubmd.runs.reading import read_events
from ubmd.runs.schedules import Schedule, schedule_of_file, schedule_of_run
from ubmd.settings import load_settings

if TYPE_CHECKING:
    from rich.console import Console

SettingsFile = Annotated[Path, typer.Argument(help="Settings file (TOML).", show_default=False)]
RunDir = Annotated[Path, typer.Argument(help="Folder of the run (run_dir of its settings).", show_default=False)]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, e.g. loop.labels=64. May be repeated.",
        autocompletion=keys_of_runs,
    ),
]

RunModels = Annotated[
    bool,
    typer.Option(
        "--run-models",
        help="Run the model files in a folder that lacks the predictions of its models (one of an earlier version): "
        "only for folders that you trust.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for function in (check, run, status, report, compare, doctor):
        app.command()(function)


def check(settings: SettingsFile, override: Override = None, label: LabelOption = None) -> None:
    """Describe what would be run, then run every stage once, in miniature: finds mistakes in a minute.

    For dynamic training (settings with a \\[dynamic] table) it only describes the run.

    Labels two structures, trains a few epochs, runs ten biased MD steps, selects and labels one more. From this it
    estimates roughly how long the whole run would take and how much it would write. It works in a hidden folder beside
    run_dir, which is kept until the next check if a stage fails.
    """
    schedule = schedule_of_file(settings)
    values = load_settings(settings, schedule.settings, [*(override or []), *label_overrides(label)])
    for line in schedule.check(values, settings.parent):
        print(line, flush=True)
    print(f"{schedule.check_shows} Start with: ubmd run {settings}".lstrip())


def run(
    settings: SettingsFile,
    override: Override = None,
    label: LabelOption = None,
    from_iteration: Annotated[
        int | None,
        typer.Option(
            "--from",
            metavar="ITERATION",
            min=0,
            help="Take the run back to this iteration, if wanted with changed settings; earlier labels stay, later "
            "ones are moved to the folder 'aside'. Leave it out to resume.",
        ),
    ] = None,
) -> None:
    """Start or resume an active-learning run.

    Labels perturbed start structures, then repeats: train, calibrate the uncertainty, run biased MD replicas in LAMMPS,
    select the most informative frames, label them. You can kill it at any time: rerun the same command to resume. A
    finished run continues, too, if loop.labels is raised.

    With a \\[dynamic] table in the settings: dynamic training. MD with the current potential requests a reference
    calculation when its predicted error is too large, learns the label, and continues.
    """
    schedule, options = schedule_of_file(settings), {}
    if from_iteration is not None:
        if not schedule.takes_back:
            raise SettingsError(
                f"--from works for active-learning loops; a {schedule.name} run can only be resumed or started again."
            )
        options["from_iteration"] = from_iteration
    values = load_settings(settings, schedule.settings, [*(override or []), *label_overrides(label)])
    # After the settings: a mistake there is reported at once, this takes seconds.
    from rich.console import Console

    with progress_of(schedule, values, settings.parent, Console()) as progress:
        folder = schedule.run(values, settings.parent, progress, **options)
    print(f"Model: {folder / 'model.pt'}\nReport: {folder / 'report' / 'report.html'}")


def progress_of(schedule: Schedule, values: Any, base: Path, console: Console) -> Any:
    """Verify a run and print what there is to say before it; the listener that prints what happens, as a context.

    Raises:
        SettingsError, DataError: the run cannot begin.
    """
    schedule.verify(values, base, _remark, _tell)
    return schedule.progress(console, schedule.timeline(values, read_events(RunFolder(values.run_dir))))


def _remark(sentence: str) -> None:
    """A remark on labels that may be a mistake."""
    print(f"Remark: {sentence}", file=sys.stderr)


def _tell(sentence: str) -> None:
    """Where the labels of a given file were taken from."""
    print(f"Labels of {sentence}", flush=True)


def status(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="Folders of runs (run_dir of their settings).", show_default=False),
    ],
) -> None:
    """Show where a run stands, or several: then one row each."""
    from ubmd.cli.console import make_console
    from ubmd.cli.run_status import overview

    if len(run_dirs) == 1:
        make_console().print(schedule_of_run(RunFolder(run_dirs[0])).status(run_dirs[0]))
    else:
        make_console().print(overview([schedule_of_run(RunFolder(path)).status_row(path) for path in run_dirs]))


def report(run_dir: RunDir, run_models: RunModels = False) -> None:
    """Make the report of a run, even of an unfinished one: one HTML page with all tables and pictures.

    Learning curves, model against reference, uncertainty against error, the worst structures, what was explored, how
    replicas ended, rejected labels, time per stage, settings and versions. Also as report.md, with the pictures as PNG
    files, for papers. With chemiscope (the extra "viewer"), structures.html shows the structures themselves.
    """
    folder = RunFolder(run_dir)
    if folder.manifest.exists():  # else there is no run to report
        check_outputs(folder.report, [], "report")
    print(f"Report: {schedule_of_run(folder).report(run_dir, run_models)[-1]}")


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
