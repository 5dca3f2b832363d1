"""The command `ubmd eval`: a model on files of structures, labelled or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ubmd.cli.console import make_console, print_remarks, print_taken, shown, user_errors
from ubmd.cli.evaluation_tables import (
    accuracy_table,
    element_table,
    group_table,
    uncertainty_sentences,
    worst_table,
)
from ubmd.cli.labels import LabelOption, label_mapping
from ubmd.cli.tables import confidence_remarks
from ubmd.cli.training_progress import count_progress
from ubmd.errors import SettingsError
from ubmd.files import check_outputs, write_text
from ubmd.spelling import nearest
from ubmd.texts import counted
from ubmd.valid_json import valid_json

if TYPE_CHECKING:
    from ubmd.data.structures import Contents
    from ubmd.measure.evaluation import Evaluation, WorstAtom

USUAL_GROUPS = "config_type"
OWN = 0.01
"""% of the rms force: no model learns labels of others that well, while numbers in files may be rounded to that"""
FILES = ("errors.json", "predictions.extxyz", "worst.extxyz", "parity.png", "calibration.png", "uncertainties.png")


def evaluate(
    model: Annotated[Path, typer.Argument(help="Model file, e.g. model.pt.")],
    data: Annotated[list[Path], typer.Argument(help="Structures: extxyz, or any format that ASE reads.")],
    precision: Annotated[
        str | None,
        typer.Option(
            help="mixed (the default, as in LAMMPS), double (slower, more digits) or single.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda (the first GPU) or cuda:n.", metavar="NAME", show_default=True)
    ] = "cpu",
    label: LabelOption = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Errors by the values of this key of the frames (default: config_type, if there is one).",
        ),
    ] = None,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="List the N worst and most uncertain frames.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for predictions.extxyz, worst.extxyz, errors.json and pictures."),
    ] = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out frames with elements that the model does not know.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Errors and uncertainties of a model on structures, and how often the errors stay below the uncertainties.

    Frames without labels are fine: their uncertainties are listed. Labels in eV, eV/Å and eV/Å^3, tension positive, or
    as --label says; a virial in eV is the stress -virial/volume. "energy" is used, not "free_energy", unless --label
    energy=free_energy is given. It is printed which keys were read, and, as a remark, whatever looks like a mistake.
    """
    from ubmd.calculator import Model

    with user_errors():
        mapping = label_mapping(label)
        if out is not None:
            _check_out(out, data)
        evaluator = Model(model, precision, device)
        remarks: list[str] = []
        files = _read(data, mapping, remarks.append)
        found = _evaluated(evaluator, files, skip_unknown)
        if found.skipped:
            remarks.append(
                f"{counted(len(found.skipped), 'frame')} left out, with elements that the model does not know; the "
                f"first is {found.skipped[0]}."
            )
        result = _result(model, found, _groups(found, by, data), worst)
        remarks += _own_labels(result)
        written = [] if out is None else _write(out, found, result, worst)
        if as_json:
            print_remarks(remarks)
            print(json.dumps(result, indent=2, allow_nan=False))
            return
        _print(files, result, dict(found.record), remarks)
        for path in written:
            print(f"wrote {path}")


def _check_out(folder: Path, data: Sequence[Path]) -> None:
    """SettingsError if the results cannot be written, or would replace a file that is evaluated."""
    written = {(folder / name).resolve() for name in FILES}
    for path in data:
        if path.resolve() in written:
            raise SettingsError(f"--out {folder}: {path.name} would replace the file {path}; name another folder.")
    check_outputs(folder, FILES, "--out")


def _groups(found: Evaluation, key: str | None, files: Sequence[Path]) -> dict[str, dict[str, Evaluation]]:
    """Key -> value -> part: by file, and by the key that was asked for (SettingsError if no frame has it)."""
    parts: dict[str, dict[str, Evaluation]] = {}
    if len(set(files)) > 1:
        of_file: dict[str, list[int]] = {}
        for k, place in enumerate(found.places):
            of_file.setdefault(place.file, []).append(k)
        parts["file"] = {name: found.select(members) for name, members in of_file.items()}
    known = {str(name) for atoms in found.frames for name in atoms.info}
    if key is not None and key not in known:
        meant = nearest(key, known)
        hint = f"did you mean '{meant}'?" if meant else f"keys of the frames: {', '.join(sorted(known)) or 'none'}."
        raise SettingsError(f"--by {key}: no frame has this key; {hint}")
    groups = found.groups(key or USUAL_GROUPS)
    if key is not None or len(groups) > 1:
        parts[key or USUAL_GROUPS] = groups
    return parts


def _read(paths: Sequence[Path], mapping: dict[str, str], remark: Callable[[str], None]) -> dict[Path, Contents]:
    """The files, each once."""
    from ubmd.data.structures import read_contents

    return {path: read_contents(path, mapping, partial=True, remark=remark) for path in dict.fromkeys(paths)}


def _evaluated(evaluator: Any, files: dict[Path, Contents], skip_unknown: bool) -> Evaluation:
    """All frames of all files; progress on stderr, so that JSON stays JSON."""
    from ubmd.measure.evaluation import Place, evaluate_frames

    frames = [atoms for contents in files.values() for atoms in contents.structures]
    places = [Place(str(path), number) for path, contents in files.items() for number in contents.numbers]
    with count_progress(Console(stderr=True), transient=True) as line:
        return evaluate_frames(
            evaluator,
            frames,
            places,
            skip_unknown=skip_unknown,
            report=lambda done, total: line("structures", done, total),
        )


# --------------------------------------------------------------------------------------------- results


def _result(
    model: Path, found: Evaluation, groups: Mapping[str, Mapping[str, Evaluation]], worst: int
) -> dict[str, Any]:
    """What --json prints and errors.json holds: only numbers that JSON has."""
    result = {
        **found.errors(),
        "model": str(model),
        "by_element": found.by_element(),
        "by": {key: {name: part.errors() for name, part in parts.items()} for key, parts in groups.items()},
        "worst": [_row(row) for row in found.worst(worst)],
        "most_uncertain": [_row(row) for row in found.most_uncertain(worst)],
        "skipped": [{"file": place.file, "frame": place.number} for place in found.skipped],
    }
    checked: dict[str, Any] = valid_json(result)
    return checked


def _own_labels(result: Mapping[str, Any]) -> list[str]:
    """A remark where the labels are what this model has predicted, as in a trajectory that it was run with."""
    relative = result["force_rmse_percent"]
    if relative is None or relative > OWN:
        return []
    return [
        f"forces of the files and of the model differ by {relative:.1g} % only: they were probably computed with this "
        "model, so errors say nothing."
    ]


def _row(row: WorstAtom) -> dict[str, Any]:
    return {
        "file": row.place.file,
        "frame": row.place.number,
        "atom": row.atom,
        "element": row.element,
        "force_error_eV_per_A": row.error,
        "u_eV_per_A": row.u,
    }


def _write(folder: Path, found: Evaluation, result: dict[str, Any], worst: int) -> list[Path]:
    """The files of --out; those that an earlier evaluation left and this one has no data for are removed."""
    from ubmd.data.extxyz import write_structures

    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    write_text(folder / "errors.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    structures = found.as_atoms()
    write_structures(folder / "predictions.extxyz", structures)
    rows = found.worst(worst) or found.most_uncertain(worst)
    if rows:
        write_structures(folder / "worst.extxyz", [structures[row.frame] for row in rows])
    _draw(folder, found)
    return [folder / name for name in FILES if (folder / name).exists()]


def _draw(folder: Path, found: Evaluation) -> None:
    """Parity and calibration where there are labels, uncertainties always."""
    import numpy as np

    from ubmd.analysis import figures
    from ubmd.measure.errors import parity_data

    if found.labelled.any():
        figures.parity_figure(parity_data(found.frames, found.predictions), folder / "parity.png")
    errors = [(p.atomic_u, e) for p, e in zip(found, found.atomic_errors, strict=True) if e is not None]
    if errors:
        atoms = [np.concatenate(values) for values in zip(*errors, strict=True)]
        largest = [np.array([values.max() for values in column]) for column in zip(*errors, strict=True)]
        figures.calibration_figure(
            {"Atoms": (atoms[0], atoms[1]), "Largest of each structure": (largest[0], largest[1])},
            folder / "calibration.png",
            [("$u_i$ (eV/Å)", "RMSE($F_i$) (eV/Å)"), ("max $u_i$ (eV/Å)", "max RMSE($F_i$) (eV/Å)")],
        )
    if len(found):
        figures.max_u_figure(found.max_u, folder / "uncertainties.png")


def _print(files: dict[Path, Contents], result: Mapping[str, Any], record: dict[str, Any], remarks: list[str]) -> None:
    """Tables for people."""
    from ubmd.cli.structure_table import describe

    console = make_console()
    for path, contents in files.items():
        console.print(describe(contents.structures, shown(str(path))))
    for path, contents in files.items():
        if any(atoms.calc is not None for atoms in contents.structures):
            print_taken([f"{path}: {contents.taken}."], console)
        else:
            console.print(f"{shown(str(path))} has no labels: uncertainties only.", soft_wrap=True, highlight=False)
    print_remarks(remarks)
    if result["labelled"]:
        console.print(accuracy_table(result, record))
    if len(result["by_element"]) > 1:
        console.print(element_table(result["by_element"]))
    for key, groups in result["by"].items():
        console.print(group_table(key, groups))
    for sentence in uncertainty_sentences(result):
        console.print(sentence, soft_wrap=True, highlight=False)
    if result["worst"]:
        console.print(worst_table("largest force errors", result["worst"], len(files) > 1))
    if result["most_uncertain"] and result["labelled"] < result["structures"]:
        console.print(worst_table("most uncertain", result["most_uncertain"], len(files) > 1))
    print_remarks(confidence_remarks(record))
