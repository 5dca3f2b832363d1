"""The command `ubmd wrap`: a trained network of another program becomes a model file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ubmd.cli.completion import keys_of_export
from ubmd.cli.console import make_console, print_remarks, print_taken, user_errors
from ubmd.cli.labels import LabelOption, label_mapping
from ubmd.cli.tables import confidence_remarks
from ubmd.errors import SettingsError
from ubmd.files import check_outputs
from ubmd.settings import ModelSettings, UncertaintySettings, make_settings
from ubmd.spelling import nearest

if TYPE_CHECKING:
    from ase import Atoms

    from ubmd.potentials.interface import RawModule


_FEATURES = ("nodes", "readout", "last-layer")


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("wrap")(wrap)


def wrap(
    module: Annotated[
        Path, typer.Argument(help="TorchScript file of energies and features, or a checkpoint of MACE (with --python).")
    ],
    data: Annotated[Path, typer.Argument(help="Labelled structures, best those that it was trained on.")],
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Labelled structures for the calibration. Default: a --share of DATA."),
    ] = None,
    share: Annotated[float, typer.Option(help="Share of DATA that is held out (no unit).", min=0.01, max=0.99)] = 0.3,
    output: Annotated[Path, typer.Option("--out", "--output", "-o", help="Model file to write.")] = Path("model.pt"),
    python: Annotated[
        Path | None, typer.Option(help="Interpreter that has the package mace, e.g. mace-env/bin/python.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Of MACE: nodes, readout or last-layer, see 'MACE' in USAGE.md.")
    ] = "nodes",
    refit: Annotated[bool, typer.Option(help="Add constants of the elements, fitted to the training labels.")] = True,
    seed: Annotated[int, typer.Option(help="Of the choice of what is held out.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a setting, e.g. alpha=0.1.", autocompletion=keys_of_export
        ),
    ] = None,
    label: LabelOption = None,
) -> None:
    """Make a model file of a trained network of another program: uncertainty, calibration, LAMMPS, bias.

    The uncertainty is fitted to the training labels and calibrated on held-out ones. Nothing is trained.
    """
    from ubmd.measure.confidence import promise
    from ubmd.potentials.wrapping import wrap as write

    with user_errors():
        check_outputs(output.parent, [output.name], "--out")
        uncertainty = make_settings(UncertaintySettings, {}, overrides or [], "--set")
        _check_choices(uncertainty, features)
        with _raw(module, python, features, uncertainty) as raw:
            print(_what(raw))
            training_set, calibration_set = _labels(data, held_out, share, seed, label)
            record = write(raw, training_set, calibration_set, uncertainty, output, refit)
        if refit:
            print(_constants(record["constants"], len(training_set)))
        sentence = promise(record["uncertainty"])
        if sentence:
            print(sentence)
        print_remarks(confidence_remarks(record))
        print(f"model: {output}")


def _check_choices(uncertainty: UncertaintySettings, features: str) -> None:
    """SettingsError for values of options that are none of those that there are."""
    if features not in _FEATURES:
        meant = nearest(features, _FEATURES)
        hint = f"did you mean {meant!r}?" if meant else f"choose {', '.join(_FEATURES[:-1])} or {_FEATURES[-1]}."
        raise SettingsError(f"--features: there is no {features!r}; {hint}")
    if uncertainty.kind not in ("posterior", "distance"):
        raise SettingsError(
            f"--set kind={uncertainty.kind}: networks of other programs have kind=posterior or kind=distance."
        )


def _labels(
    data: Path, held_out: Path | None, share: float, seed: int, label: list[str] | None
) -> tuple[list[Atoms], list[Atoms]]:
    """Training and held-out structures; prints where their labels are from."""
    from ubmd.data.split import split
    from ubmd.data.structures import read_contents

    mapping, remarks = label_mapping(label), list[str]()
    files = {
        path: read_contents(path, mapping, labelled=True, remark=remarks.append)
        for path in dict.fromkeys([data, *([held_out] if held_out else [])])
    }
    print_taken([f"{path}: {contents.taken}." for path, contents in files.items()], make_console())
    print_remarks(remarks)
    if held_out is not None:
        return files[data].structures, files[held_out].structures
    training, calibration = split(files[data].structures, share, seed)
    print_remarks(
        [
            f"{len(calibration)} of the {len(training) + len(calibration)} structures of {data} calibrate; if the "
            "network was trained on them, its errors elsewhere are larger than promised: give others as --held-out."
        ]
    )
    return training, calibration


@contextmanager
def _raw(module: Path, python: Path | None, features: str, uncertainty: UncertaintySettings) -> Iterator[RawModule]:
    """The module of either kind of file; that of MACE lies in a folder that is removed afterwards."""
    from ubmd.potentials.raw import is_torchscript, read_raw

    if is_torchscript(module) or python is None:
        if module.is_file() and not is_torchscript(module):
            raise SettingsError(
                f"{module} is no TorchScript file; if it is a checkpoint of MACE, name a Python that has the package "
                "mace: --python mace-env/bin/python."
            )
        yield read_raw(module)
        return
    import tempfile

    from ubmd.potentials.mace.backend import Mace

    with tempfile.TemporaryDirectory() as folder:
        backend = Mace()
        values = {"kind": "mace", "checkpoint": module.absolute(), "python": python.absolute(), "features": features}
        backend.configure(make_settings(ModelSettings, values, (), "--features"), Path.cwd())
        yield backend.convert(module, uncertainty, Path(folder, "module.pt"))


def _what(raw: RawModule) -> str:
    """The module in one line."""
    known = [f"{key} {raw.backend[key]}" for key in ("version", "licence") if key in raw.backend]
    name = " ".join([raw.backend["name"], *known])
    shown = raw.elements if len(raw.elements) <= 10 else [*raw.elements[:9], f"... ({len(raw.elements)})"]
    return (
        f"{name}: elements {' '.join(shown)}; cutoff {raw.cutoff:g} Å, {raw.layers} layer"
        f"{'s' if raw.layers > 1 else ''}; {raw.precision}; {raw.n_features} features"
    )


def _constants(constants: dict[str, float], count: int) -> str:
    table = ", ".join(f"{element} {value:+.4f}" for element, value in constants.items())
    return f"Constants added to the energies, fitted to the {count} training labels, eV per atom: {table or 'none'}."
