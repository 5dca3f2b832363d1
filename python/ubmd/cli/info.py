"""`ubmd info`: what a run folder or a model file is, read without running the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ubmd.cli.console import make_console, print_remarks, shown, user_errors
from ubmd.cli.tables import confidence_remarks, flat, info_table
from ubmd.errors import ModelError
from ubmd.valid_json import valid_json


def info(
    path: Annotated[Path, typer.Argument(help="Model file (model.pt), or folder of a run.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as it is in the file.")] = False,
) -> None:
    """Print where a model file or a run comes from: versions, seeds, hashes, settings.

    Nothing in the file or the folder is executed: it may come from someone you do not know.
    """
    with user_errors():
        record, tables, remarks = _run_info(path) if path.is_dir() else _model_info(path)
        if as_json:
            print(json.dumps(valid_json(record), indent=2))
            return
        for table in tables:
            make_console().print(table)
        print_remarks(remarks)


def _run_info(folder: Path) -> tuple[dict[str, Any], list[Table], list[str]]:
    """(manifest, tables, remarks) of a run."""
    from ubmd.analysis.provenance import changed_settings, provenance_rows
    from ubmd.runs.confidence import confidence
    from ubmd.runs.folder import RunFolder
    from ubmd.runs.manifest import read_settings_of
    from ubmd.runs.reading import read_iterations
    from ubmd.runs.schedules import schedule_of_run
    from ubmd.settings import RunSettings

    run = RunFolder(folder)
    settings = read_settings_of(run, schedule_of_run(run).settings)
    tables = [
        info_table(shown(str(folder)), ("what", "value")),
        info_table("changed settings", ("key", "value", "default")),
    ]
    for table, rows in zip(tables, (provenance_rows(run), changed_settings(settings)), strict=True):
        for row in rows:
            table.add_row(*map(shown, row))
    remarks = confidence(read_iterations(run, newest=1), settings) if isinstance(settings, RunSettings) else ()
    return run.read_manifest(), tables, list(remarks)


def _model_info(path: Path) -> tuple[dict[str, Any], list[Table], list[str]]:
    """(record, tables, remarks) of a model file, which is not run."""
    from ubmd.potentials.kinds import kind_of_record
    from ubmd.potentials.record import complete_record, read_record

    record = read_record(path)
    if record is None:
        raise ModelError(
            f"{path} has no record that can be read without running it, so nothing is known about it; its author "
            "can add one (see 'extra file ubmd.json' in the manual of pair_style ubmd)."
        )
    with complete_record(path):
        if kind_of_record(record).of_crystal:
            from ubmd.cli.tables import info_tables

            return record, info_tables(record, shown(str(path))), []
        table = info_table(shown(str(path)), ("key", "value"))
        for row in flat(record):
            table.add_row(*map(shown, row))
        remarks = confidence_remarks(record)
    return record, [table], remarks
