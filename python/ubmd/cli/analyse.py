"""Commands that turn finished runs and trajectories into numbers and pictures: table, trajectory, calibration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ubmd.cli.console import print_remarks, print_taken
from ubmd.cli.labels import LabelOption, label_mapping
from ubmd.cli.run import RunModels
from ubmd.cli.train import SetOption
from ubmd.errors import SettingsError
from ubmd.files import check_outputs
from ubmd.settings import TrainSettings, UncertaintySettings, make_settings


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    for function in (table, trajectory, calibration):
        app.command()(function)


def table(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or row files (JSON).", show_default=False)],
    published: Annotated[
        Path | None, typer.Option(help="TOML file with a published table, shown row by row below the runs.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Name of a row, in order of the runs; may be repeated.")
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with titles of rows: \\[rows.NAME] title, for run folders NAME_seed0, NAME_seed1 ..."
        ),
    ] = None,
    labels: Annotated[
        int | None, typer.Option(help="Use the first model with at least this many labels (default: the last).")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Markdown file (default: print).")] = None,
    run_models: RunModels = False,
) -> None:
    """Make rows of a table from finished runs, beside published ones: mean ± standard deviation over seeds.

    Coverage and volumes of the MD, errors on the test set, autocorrelation times (runs with md.trace_every).
    """
    from ubmd.analysis.table import collect_rows, read_published, read_titles, table_markdown

    if out is not None:
        check_outputs(out.parent, [out.name], "--out")
    found = collect_rows(
        runs,
        name,
        labels,
        read_titles(rows) if rows else None,
        lambda why: print(f"Not counted: {why}", file=sys.stderr),
        run_models,
    )
    text = table_markdown(found, read_published(published) if published else None)
    if out is None:
        print(text)
    else:
        out.write_text(text, encoding="utf-8")
        print(f"Table: {out}")


def trajectory(
    files: Annotated[
        list[Path], typer.Argument(help="Trajectories of one system: extxyz, LAMMPS dump, ..., or traces (npz).")
    ],
    spacing: Annotated[float | None, typer.Option(help="Time between frames, fs (traces contain it).")] = None,
    model: Annotated[Path | None, typer.Option(help="Model file that computes max_i u_i of the frames.")] = None,
    torsion: Annotated[
        list[str] | None,
        typer.Option("--torsion", metavar="NAME=I,J,K,L", help="Torsion for the coverage (atoms from 0); give two."),
    ] = None,
    shortest: Annotated[float, typer.Option(help="Shortest trajectory for autocorrelation times, ps.")] = 1.0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("trajectory"),
) -> None:
    """Describe what trajectories explore and how fast they decorrelate: coverage, volumes, autocorrelation times.

    Any trajectory will do, whatever its bias, metadynamics for instance. A stride of 10 fs or less is needed for
    autocorrelation times.
    """
    from ubmd.analysis.trajectory_report import describe_trajectories
    from ubmd.cli.console import make_console

    if spacing is not None and not spacing > 0.0:
        raise SettingsError(f"--spacing must be above 0 fs, not {spacing:g}.")
    check_outputs(out, [], "--out")
    rows, pictures = describe_trajectories(
        files, None if spacing is None else spacing / 1000.0, model, _torsions(torsion or []), shortest, out
    )
    from rich.table import Table

    shown = Table("what", "value")
    for what, value in rows:
        shown.add_row(what, value)
    make_console().print(shown)
    print("Pictures: " + ", ".join(str(path) for path in pictures))


def calibration(
    data: Annotated[Path, typer.Argument(help="Labelled structures (extxyz, or any format that ASE reads).")],
    training: Annotated[int, typer.Option(min=1, help="Training structures of every split.")] = 45,
    calibrating: Annotated[int, typer.Option(min=1, help="Calibration structures of every split.")] = 5,
    test: Annotated[
        int | None, typer.Option(min=1, help="Test structures of every split; default: all others.")
    ] = None,
    splits: Annotated[int, typer.Option(min=1, help="Random splits.")] = 5,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="Kind of uncertainty; default: posterior, distance, ensemble.")
    ] = None,
    low: Annotated[
        float,
        typer.Option(
            help="Miscoverage alpha of the low confidence (a share, no unit; 0.5: 50 % confidence); that of the high "
            "one is uncertainty.alpha."
        ),
    ] = 0.5,
    label: LabelOption = None,
    override: SetOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for trainings and results.")] = Path("calibration"),
) -> None:
    """Show how far calibrated uncertainties can be trusted on your data: largest errors against largest uncertainties.

    Trains on random splits and compares kinds of uncertainty, low and high confidence, and the two ways to calibrate.
    Rerun the same command to resume an interrupted study. --set changes model.*, training.* and uncertainty.*.
    """
    from ubmd.analysis.calibration_study import HEAD, KINDS, Sizes, calibration_study, summary_rows, write_study
    from ubmd.cli.console import make_console
    from ubmd.data.structures import read_contents

    values = {"training_file": str(data), "output_dir": str(out)}
    settings = make_settings(TrainSettings, values, override or [], "ubmd calibration")
    kinds = kind or list(KINDS)
    for name in kinds:  # a typo shows before the training
        make_settings(UncertaintySettings, {"kind": name}, (), "--kind")
    remarks: list[str] = []
    contents = read_contents(data, label_mapping(label), labelled=True, remark=remarks.append)
    structures = contents.structures
    print_taken([f"{data}: {contents.taken}."], make_console())
    print_remarks(remarks)
    sizes = Sizes(training, calibrating, _test_size(data, len(structures), training, calibrating, test))
    outcomes = calibration_study(
        structures,
        sizes,
        splits,
        kinds,
        settings.model,
        settings.training,
        settings.uncertainty,
        out,
        settings.seed,
        lambda line: print(line, flush=True),
    )
    alphas = [low, settings.uncertainty.alpha]
    files = write_study(outcomes, sizes, alphas, out, f"Calibration on {data.name}")
    from rich.table import Table

    columns = [0, 1, 2, 3, 4, 5, 8, 9]  # the page has the rest
    shown = Table(*(HEAD[k] for k in columns), caption="shares covered, mean ± standard deviation over the splits")
    for row in summary_rows(outcomes, alphas):
        shown.add_row(*(row[k] for k in columns))
    make_console().print(shown)
    print(f"Tables and pictures: {files[-1]}")


def _test_size(data: Path, count: int, training: int, calibrating: int, test: int | None) -> int:
    """Number of test structures of every split: the given one, or all that are left.

    Raises:
        SettingsError: there are too few.
    """
    rest = count - training - calibrating
    others = f"--training {training} and --calibrating {calibrating}"
    if rest < 1:
        raise SettingsError(f"{data} holds {count} structures: {others} leave none for the test; lower them.")
    if test is not None and test > rest:
        raise SettingsError(
            f"{data} holds {count} structures: {others} leave {rest} for the test, not --test {test}; lower one of "
            "them, or leave out --test."
        )
    return rest if test is None else test


def _torsions(options: list[str]) -> dict[str, tuple[int, int, int, int]]:
    """name -> atoms of NAME=I,J,K,L."""
    found = {}
    for option in options:
        name, _, atoms = option.partition("=")
        try:
            a, b, c, d = (int(text) for text in atoms.split(","))
        except ValueError:
            raise SettingsError(f"--torsion {option}: write a name and four atoms, as in phi=4,6,8,14.") from None
        found[name.strip()] = (a, b, c, d)
    return found
