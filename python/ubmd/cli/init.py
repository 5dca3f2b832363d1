"""`ubmd init`: a settings file, also with values that fit a user's own structures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ubmd.cli.console import print_remarks
from ubmd.errors import DataError, SettingsError
from ubmd.files import check_outputs, write_text
from ubmd.imports import Lazy
from ubmd.runs.schedules import DYNAMIC, LOOP, Schedule

if TYPE_CHECKING:
    from ase import Atoms

_DEFAULT = Path("settings.toml")
_WORDS = 50
"""characters of a structure file's name that the name of a folder takes"""


class _Kind(NamedTuple):
    """A kind of settings files."""

    template: Callable[..., str]
    short_template: Callable[..., str]
    propose: Callable[[Any, Path, str], Any]
    to_fill_in: str
    """what a file lacks that no structures were given for"""
    reference: str
    """what every file lacks"""
    then: str
    """the command that takes it"""


def _of_schedule(schedule: Schedule) -> _Kind:
    to_fill_in = f"run_dir, {schedule.to_fill_in} and the reference"
    return _Kind(
        schedule.template, schedule.short_template, schedule.propose, to_fill_in, "reference.calculator", "check"
    )


_TRAINING = _Kind(
    Lazy("ubmd.cli.template:training_template"),
    Lazy("ubmd.cli.template:short_training_template"),
    Lazy("ubmd.learning.proposal:propose_training"),
    "training_file and output_dir",
    "",
    "train",
)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(init)


def init(
    path: Annotated[
        Path, typer.Argument(help="Your structures (any file that ASE reads), or the file to write (.toml).")
    ] = _DEFAULT,
    out: Annotated[Path | None, typer.Argument(help="File to write, after structures.", show_default=False)] = None,
    short: Annotated[bool, typer.Option("--short", help="Only the keys that most people set.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="For dynamic training of a crystal's potential.")] = False,
    train: Annotated[bool, typer.Option("--train", help="For `ubmd train`, from structures with labels.")] = False,
) -> None:
    """Write a settings file in which every key is explained.

    With a file of structures, values that fit them are filled in, each with its reason: ensemble, time step, cutoff,
    displacements of the start copies, and so on. Only the reference is left for you.
    """
    if dynamic and train:
        raise SettingsError("--dynamic and --train are two kinds of settings files; give one of them.")
    kind = _TRAINING if train else _of_schedule(DYNAMIC if dynamic else LOOP)
    source = path if _is_structures(path) else None
    if source is None and out is not None:
        raise SettingsError(f"{path} is a settings file; give one file to write, or structures and then that file.")
    target = (out or _DEFAULT) if source is not None else path
    if target.exists():
        raise SettingsError(f"{target} already exists; name another file.")
    if not target.parent.is_dir():
        raise SettingsError(f"There is no folder {target.parent}; create it, or name another file.")
    check_outputs(target.parent, [], "FILE")
    filled = _proposed(kind, source, target, train) if source is not None else {}
    write_text(target, (kind.short_template if short else kind.template)(target.name, filled))
    todo = (
        f"Set {kind.to_fill_in}, then"
        if source is None
        else f"Set {kind.reference}, then"
        if kind.reference
        else "Then"
    )
    print(f"Wrote {target}. {todo}: ubmd {kind.then} {target}")


def _is_structures(path: Path) -> bool:
    """Whether a path is a file of structures, not a settings file to be written.

    Raises:
        SettingsError: it is one by its ending, but is not there.
    """
    if path.is_dir() and next(path.rglob("type.raw"), None) is not None:
        return True  # deepmd/npy
    if path.suffix.lower() == ".toml" or (not path.suffix and not path.is_file()):
        return False
    if not path.is_file():
        raise SettingsError(f"There is no file {path} with structures (a settings file to write ends in .toml).")
    return True


def _proposed(kind: _Kind, source: Path, target: Path, train: bool) -> Any:
    """What is filled in; the file is named relative to the settings file, as it will be read."""
    file = Path(os.path.relpath(source.resolve(), target.parent.resolve()))
    dynamic = kind.propose is DYNAMIC.propose
    return kind.propose(_read(source, train, not dynamic), file, _folder_name(source))


def _read(source: Path, wanted: bool, useful: bool) -> list[Atoms]:
    """The structures, with labels where these are useful; if they are wanted but missing, a remark says why."""
    from ubmd.data.structures import read_structures

    remarks: list[str] = []
    if useful:
        try:
            structures = read_structures(source, labelled=True, remark=remarks.append)
        except DataError as error:
            remarks = [f"{error} The key 'labels' in the settings names other keys."] if wanted else []
        else:
            print_remarks(remarks)
            return structures
    print_remarks(remarks)
    return read_structures(source, compare=False)


def _folder_name(source: Path) -> str:
    """The name of the file without its ending, in characters that every shell takes."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in source.stem)[:_WORDS]
    return name.strip("._-") or "my"
