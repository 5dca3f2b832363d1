"""The option --label: where files have their labels, in the syntax of the settings table [labels]."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from ubmd.errors import SettingsError
from ubmd.settings.labels import parse_sources

LabelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="LABEL=KEY[:UNIT]",
        help="Where files have a label (energy, forces, stress, virial): KEY, KEY:UNIT, or :UNIT for the usual key in "
        "another unit, e.g. energy=qm_energy:Ha or stress=:kbar; :-kbar: with the opposite sign. May be repeated. "
        "Default: the keys that usual packages write, in eV, eV/Å, eV/Å^3; where a frame has several, they must agree.",
    ),
]


def label_mapping(pairs: Sequence[str] | None) -> dict[str, str]:
    """LABEL=KEY[:UNIT] options as a dictionary; SettingsError for what is not one."""
    mapping: dict[str, str] = {}
    for pair in pairs or []:
        label, separator, source = pair.partition("=")
        if not separator or not source:
            raise SettingsError(f"--label needs LABEL=KEY[:UNIT], e.g. energy=qm_energy or energy=:Ha; got {pair!r}.")
        if mapping.get(label, source) != source:
            raise SettingsError(f"--label names two keys for {label}: {mapping[label]} and {source}; give one.")
        mapping[label] = source
    try:
        parse_sources(mapping)
    except ValueError as error:
        raise SettingsError(f"--label: {error}.") from None
    return mapping


def label_overrides(pairs: Sequence[str] | None) -> list[str]:
    """The same as settings to override, for commands that read a settings file."""
    return [f"labels.{label}={json.dumps(source)}" for label, source in label_mapping(pairs).items()]
