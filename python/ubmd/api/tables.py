"""Settings that are given from Python: as a dictionary, as an object, or as a file; and what fills their gaps."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.errors import SettingsError
from ubmd.learning.proposal import Suggestions
from ubmd.settings import Table, read_tables

Tables = dict[str, Any]
Given = Mapping[str, Any] | Table | Path | str | None


def tables_of(settings: Given) -> Tables:
    """A copy of the settings as tables of values, unchecked; SettingsError for a file that cannot be read."""
    if settings is None:
        return {}
    if isinstance(settings, Path | str):
        return read_tables(Path(settings))
    if isinstance(settings, Table):
        return settings.model_dump(exclude_unset=True)
    return copy.deepcopy(dict(settings))


def base_of(settings: Given) -> Path:
    """The folder that files in the settings are relative to."""
    return Path(settings).parent if isinstance(settings, Path | str) else Path()


def source_of(settings: Given) -> str:
    """What error messages call the settings."""
    return str(settings) if isinstance(settings, Path | str) else "settings"


def as_list(structures: Atoms | Iterable[Atoms], name: str) -> list[Atoms]:
    """Structures as a list; SettingsError, with the name of the argument, if they are none."""
    found = [structures] if isinstance(structures, Atoms) else list(structures)
    for thing in found:
        if not isinstance(thing, Atoms):
            raise SettingsError(f"{name}: an object of type {type(thing).__name__} is not a structure (ase.Atoms).")
    if not found:
        raise SettingsError(f"{name}: there is no structure.")
    return found


def stem_of(structures: list[Atoms]) -> str:
    """A name for folders: the formula of the first structure."""
    return str(structures[0].get_chemical_formula()) or "my"


def fill(values: Tables, suggestions: Suggestions) -> None:
    """Set what is not set yet.

    Raises:
        SettingsError: a table of the settings is a value.
    """
    for key, suggestion in suggestions.items():
        *tables, name = key.split(".")
        place = values
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise SettingsError(f"settings: '{table}' is a table, got {place!r}.")
        place.setdefault(name, suggestion.value)
