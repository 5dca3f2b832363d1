"""Commands around one model: train, eval, info, export, schema.

The heavy imports (torch, ase) happen inside the commands, so that `ubmd --help` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, TypeAdapter
from rich.console import Console
from rich.table import Table

from ubmd.cli.completion import keys_of_export, keys_of_training
from ubmd.cli.console import make_console, print_remarks, print_taken, user_errors
from ubmd.cli.evaluate import evaluate
from ubmd.cli.info import info
from ubmd.cli.labels import LabelOption, label_mapping, label_overrides
from ubmd.cli.tables import confidence_remarks
from ubmd.cli.training_progress import training_progress
from ubmd.errors import SettingsError
from ubmd.files import check_outputs
from ubmd.potentials.kinds import kind_of_settings
from ubmd.settings import USUAL_INFO, TrainSettings, UncertaintySettings, load_settings, make_settings
from ubmd.texts import counted, wall_time

if TYPE_CHECKING:
    from ase import Atoms

    from ubmd.potentials.interface import Backend, Summary


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting, e.g. training.epochs=200.",
        autocompletion=keys_of_training,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("train")(train)
    app.command("eval")(evaluate)
    app.command("info")(info)
    app.command("export")(export)
    app.command("schema")(schema)


# ---------------------------------------------------------------------------------------------- train


def train(
    settings_file: Annotated[Path, typer.Argument(help="TOML file of the training (see `ubmd schema train`).")],
    overrides: SetOption = None,
    label: LabelOption = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Start from scratch, or resume from the last checkpoint (default).")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="PATH",
            help="Start from this model instead of random weights: model.pt, weights.pt, checkpoint.pt, or the folder "
            "of a run or training.",
        ),
    ] = None,
) -> None:
    """Train a model on labelled structures and export it as model.pt.

    A network, or, if the settings have a table "crystal", a force-constant potential of a crystal. A training that has
    ended continues if training.epochs is raised.
    """
    with user_errors():
        settings = load_settings(settings_file, TrainSettings, [*(overrides or []), *label_overrides(label)])
        train_model(settings, settings_file.parent, fresh, source)


def train_model(
    settings: TrainSettings, base: Path, fresh: bool = False, source: Path | None = None, quiet: bool = False
) -> None:
    """Train and export a model of either kind; prints how it goes, unless ``quiet``.

    Args:
        settings: of the training.
        base: folder of the settings file.
        fresh: start again, even if the folder has a checkpoint.
        source: an earlier model to start from.
        quiet: print remarks only.

    Raises:
        SettingsError, DataError, TrainingError: as their names say.
    """
    if not kind_of_settings(settings).of_crystal:
        _train(settings, base, fresh, source, Console(quiet=quiet))
        return
    from ubmd.cli.fit import train_crystal

    if source is not None:
        raise SettingsError("--from is for networks: a force-constant potential is fitted at once.")
    train_crystal(settings, base, fresh, Console(quiet=True) if quiet else make_console())


def _train(settings: TrainSettings, base: Path, fresh: bool, source: Path | None, console: Console) -> None:
    """Train and export a network of any back end; ``base`` is the folder of the settings file."""
    from ubmd.cli.structure_table import describe
    from ubmd.data.labels import dataset_hash
    from ubmd.devices import usable
    from ubmd.measure.confidence import promise
    from ubmd.potentials.fitting import export_checkpoints
    from ubmd.potentials.interface import Labels, Prolongs, TrainingTable
    from ubmd.potentials.kinds import check_backend, check_training_device
    from ubmd.potentials.members import member_folders, train_networks

    uncertainty, path = settings.uncertainty, settings.output_dir / "model.pt"
    backend = check_backend(settings.model, uncertainty, base)
    check_training_device(backend, settings.training)
    _check_outputs(settings, backend)
    remarks: list[str] = []
    taken: list[str] = []
    training_set, validation_set = _load_sets(settings, base, remarks.append, taken.append)
    console.print(describe(training_set, "training set"))
    console.print(describe(validation_set, "validation set"))
    print_taken(taken, console)
    print_remarks(remarks)
    table = TrainingTable(settings.model, settings.training, fresh=fresh, prolong=True)
    labels, networks = Labels(training_set, validation_set), uncertainty.networks
    starts = None if source is None else _starts(source, settings, backend, training_set, console)
    if isinstance(backend, Prolongs) and not fresh:
        first = member_folders(settings.output_dir, networks)[0]
        _print_if_any(backend.prolongation(first, settings.training.epochs), console)
    counts = {"train": len(training_set), "valid": len(validation_set)}
    with training_progress(console, counts) as report:
        checkpoints = train_networks(
            backend, networks, table, labels, settings.output_dir, settings.seed, starts, report
        )
    provenance = {"training_set_hash": dataset_hash(training_set), "settings": settings.model_dump(mode="json")}
    model = settings.model
    device = usable(settings.training.device)
    metadata = export_checkpoints(
        backend, checkpoints, model, training_set, validation_set, uncertainty, path, provenance, device=device
    )
    for checkpoint in checkpoints:
        _print_summary(backend, checkpoint.parent, console, counts)
    _print_if_any(promise(metadata["uncertainty"]), console)
    print_remarks(confidence_remarks(metadata))
    console.print(f"model: {path}", soft_wrap=True, markup=False)


def _starts(
    source: Path, settings: TrainSettings, backend: Backend, training_set: list[Atoms], console: Console
) -> list[Path]:
    """Checkpoints that the networks start from, made of the model that ``--from`` names."""
    from ubmd.potentials.starting import constants_told, file_to_start_from, start_from

    file, folder = file_to_start_from(source, backend, "--from"), settings.output_dir / "initial"
    paths, constants = start_from(file, backend, settings.uncertainty.networks, settings.model, training_set, folder)
    _print_if_any(f"starts from {file}. {constants_told(constants)}".rstrip(), console)
    return paths


def _print_if_any(sentence: str, console: Console) -> None:
    if sentence:
        console.print(sentence, soft_wrap=True, highlight=False, markup=False)


def _check_outputs(settings: TrainSettings, backend: Backend) -> None:
    """SettingsError if the results cannot be written."""
    from ubmd.potentials.interface import KeepsLog
    from ubmd.potentials.members import member_folders

    check_outputs(settings.output_dir, ["model.pt"], "output_dir")
    logs = backend.logs if isinstance(backend, KeepsLog) else ()
    for folder in member_folders(settings.output_dir, settings.uncertainty.networks):
        check_outputs(folder, [*logs, backend.checkpoint], "output_dir")


def _load_sets(
    settings: TrainSettings, base: Path, remark: Callable[[str], None], tell: Callable[[str], None]
) -> tuple[list[Atoms], list[Atoms]]:
    """Training and validation structures; files are relative to the settings file."""
    from ubmd.data.split import split
    from ubmd.data.state import mixed_states
    from ubmd.data.structures import read_contents

    contents = read_contents(base / settings.training_file, settings.labels, labelled=True, remark=remark)
    tell(f"{settings.training_file}: {contents.taken}.")
    for first, second, difference in islice(mixed_states(contents.structures, USUAL_INFO), 1):
        remark(
            f"{settings.training_file}: frames {contents.numbers[first]} and {contents.numbers[second]} have the same "
            f"composition but {difference}, which a model cannot tell apart."
        )
    if settings.validation_file is None:
        return split(contents.structures, settings.validation_share, settings.seed)
    validation = read_contents(base / settings.validation_file, settings.labels, labelled=True, remark=remark)
    tell(f"{settings.validation_file}: {validation.taken}.")
    return contents.structures, validation.structures


def _print_summary(backend: Backend, folder: Path, console: Console, counts: Mapping[str, int]) -> None:
    """The tables and files of the training in this folder, of a back end that keeps a log."""
    from ubmd.potentials.interface import KeepsLog

    found = backend.summary(folder) if isinstance(backend, KeepsLog) else None
    if isinstance(backend, KeepsLog) and found is not None:
        console.print(_training_summary(found, counts))
        console.print(f"log and picture: {folder / ', '.join(backend.logs)}", soft_wrap=True, markup=False)


def _training_summary(found: Summary, counts: Mapping[str, int]) -> Table:
    """RMSEs of the kept weights."""
    table = Table(title=f"kept: epoch {found.best['epoch']} of {found.epochs}", caption=_caption(found))
    behind = {part: counted(count, "structure") for part, count in counts.items()}
    headings = {"train": f"training (during the epoch; {behind['train']})", "valid": f"validation ({behind['valid']})"}
    measured = [part for part in headings if any(name.startswith(f"{part}_") for name in found.best)]
    for column in ("RMSE", *(headings[part] for part in measured), "unit"):
        table.add_column(column)
    for name, key, unit in (
        ("energy", "energy_rmse_meV_per_atom", "meV/atom"),
        ("force", "force_rmse_eV_per_A", "eV/Å"),
        ("stress", "stress_rmse_MPa", "MPa"),
    ):
        values = [found.best.get(f"{part}_{key}") for part in measured]
        if any(value is not None for value in values):
            table.add_row(name, *("" if value is None else f"{value:.4g}" for value in values), unit)
    return table


def _caption(found: Summary) -> str | None:
    """Seconds per epoch, and of all, of a back end that measures them; what it notes."""
    lines = [found.note] if found.note else []
    if found.seconds is not None:
        each = found.seconds / max(1, found.epochs)
        per_epoch = wall_time(each) if each >= 1.0 else f"{each:.2g} s"
        lines.append(f"{per_epoch} per epoch, {wall_time(found.seconds)} in all")
    return "\n".join(lines) or None


# -------------------------------------------------------------------------------- info, export, schema


def export(
    weights: Annotated[Path, typer.Argument(help="weights.pt of a training.")],
    training_file: Annotated[Path, typer.Argument(help="The structures that the weights were trained on.")],
    calibration_file: Annotated[Path, typer.Argument(help="Labelled structures for the calibration.")],
    output: Annotated[Path, typer.Option("--out", "--output", "-o", help="Model file to write.")] = Path("model.pt"),
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting, e.g. alpha=0.5.", autocompletion=keys_of_export
        ),
    ] = None,
    member: Annotated[
        list[Path] | None, typer.Option("--member", help="weights.pt of each other member, with --set kind=ensemble.")
    ] = None,
    label: LabelOption = None,
    operators: Annotated[
        bool | None,
        typer.Option(
            "--operators/--no-operators",
            help="Use the compiled operators (default where available), or plain PyTorch: slower, runs anywhere.",
        ),
    ] = None,
) -> None:
    """Make a model file from trained weights, e.g. with another confidence: --set alpha=0.5."""
    from ubmd.data.labels import dataset_hash
    from ubmd.data.structures import read_contents
    from ubmd.potentials.fitting import export_raw
    from ubmd.potentials.gmnn.backend import GaussianMoments
    from ubmd.potentials.gmnn.checkpoint import load_weights

    with user_errors():
        check_outputs(output.parent, [output.name], "--out")
        uncertainty = make_settings(UncertaintySettings, {}, overrides or [], "--set")
        backend = GaussianMoments(operators)
        raw = backend.raw_module([weights, *(member or [])], uncertainty)
        model = load_weights(weights).settings
        remarks: list[str] = []
        mapping = label_mapping(label)
        files = {
            path: read_contents(path, mapping, labelled=True, remark=remarks.append)
            for path in dict.fromkeys([training_file, calibration_file])
        }
        training_set, calibration_set = (files[path].structures for path in (training_file, calibration_file))
        print_taken([f"{path}: {contents.taken}." for path, contents in files.items()], make_console())
        print_remarks(remarks)
        provenance = {
            "training_set_hash": dataset_hash(training_set),
            "settings": {"uncertainty": uncertainty.model_dump(mode="json")},
        }
        metadata = export_raw(raw, backend.name, model, training_set, calibration_set, uncertainty, output, provenance)
        attainable = metadata["uncertainty"]["energy"]["attainable"]
        print(f"wrote {output}: uncertainties of structures hold at {100 * attainable:.4g} % confidence")
        print_remarks(confidence_remarks(metadata))


def schema(
    kind: Annotated[
        str,
        typer.Argument(
            help="Settings: run, dynamic (`ubmd run` with a \\[dynamic] table) or train. What a run writes: history "
            "(history.json) or events (events.jsonl)."
        ),
    ] = "run",
) -> None:
    """Print the JSON schema of a settings file, or of what a run writes: every key, its unit, default and range."""
    from ubmd.runs.event_records import EVENTS
    from ubmd.runs.records import IterationEntry, RoundEntry
    from ubmd.runs.schedules import SCHEDULES

    kinds: dict[str, type[BaseModel] | TypeAdapter[Any]] = {
        **{schedule.schema: schedule.settings for schedule in SCHEDULES},
        "train": TrainSettings,
        "history": TypeAdapter(list[IterationEntry] | list[RoundEntry]),
        "events": EVENTS,
    }
    with user_errors():
        if kind not in kinds:
            *others, last = kinds
            raise SettingsError(f"There is no schema of '{kind}'; choose {', '.join(others)} or {last}.")
        # By the names that the template uses; a key may have an alias.
        known = kinds[kind]
        described = (
            known.json_schema(by_alias=False)
            if isinstance(known, TypeAdapter)
            else known.model_json_schema(by_alias=False)
        )
        print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **described}, indent=2))
