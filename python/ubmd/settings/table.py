"""Tables of settings: one pydantic model each, read from TOML, checked, with the exact key in every error."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ubmd.errors import SettingsError


class Table(BaseModel):
    """A table of the settings file: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


T = TypeVar("T", bound="Table")


def load_settings(path: Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a TOML settings file; ``overrides`` are ``table.key=value`` strings with TOML values.

    Raises:
        SettingsError: one sentence that names the exact key and, for a typo, the nearest valid name.
    """
    values = read_tables(path)
    return make_settings(kind, values, overrides, str(path))


def read_tables(path: Path) -> dict[str, Any]:
    """What a TOML file holds, unchecked; SettingsError if it is not there or no TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"There is no settings file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as a settings file: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}.") from None


def make_settings(kind: type[T], values: dict[str, Any], overrides: Sequence[str] = (), source: str = "settings") -> T:
    """Settings from a dictionary (changed by the overrides); ``source`` names its origin in error messages.

    Raises:
        SettingsError: as in `load_settings`.
    """
    for override in overrides:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_explain(error, kind)}") from None


def _override(values: dict[str, Any], override: str) -> None:
    """Set one ``table.key=value`` in a nested dictionary; a value that is not TOML is taken as text."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise SettingsError(f"--set needs key=value, got {override!r}.")
    *tables, last = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise SettingsError(f"--set {override}: '{table}' is a value, not a table.")
    try:
        values[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[last] = text.strip()


def _explain(error: ValidationError, kind: type[Table]) -> str:
    """One sentence for the first validation error, with the nearest valid key for unknown ones."""
    # an unknown key (a typo) explains a missing one better than the message about the missing one does
    first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {_suggestion(kind, location)}"
    if location and location[-1].isdigit():  # one of several values, e.g. the atoms of a torsion
        key = ".".join(location[:-1])
        if first["type"] == "missing":
            return f"'{key}' has too few values (got {first['input']!r})."
    if first["type"] == "missing":
        return f"the key '{key}' is missing{_purpose(kind, location)}."
    if first["type"] == "model_type":
        return f"'{key}' is a table: write its keys below a line [{key}] (got {first['input']!r})."
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):  # a rule on several keys, which its message names
        return f"{message}."
    return f"'{key}': {message} (got {first['input']!r})." if location else f"{message}."


def _suggestion(kind: type[Table], location: list[str]) -> str:
    """What the user may have meant: a similar key of the same table, the same key of another one, or any of these."""
    name, names = location[-1], _fields_at(kind, location[:-1])
    same = [path for path in _paths(kind) if path.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name, names, n=1)
    if near or not same:
        near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        return f"did you mean '{near[0]}'?" if near else "this table has no keys."
    return f"did you mean {' or '.join(repr(path) for path in same[:3])}?"


def _purpose(kind: type[Table], location: list[str]) -> str:
    """The description of a missing key, in brackets."""
    try:
        table = _table_at(kind, location[:-1])
        text = table.model_fields[location[-1]].description or (_table_at(kind, location).__doc__ or "").rstrip(".")
    except (KeyError, StopIteration):
        return ""
    return f" ({text})" if text else ""


def _fields_at(kind: type[Table], location: list[str]) -> list[str]:
    """Field names of the table at a location inside the settings."""
    return list(_table_at(kind, location).model_fields)


def _table_at(kind: type[Table], location: list[str]) -> type[Table]:
    """The table at a location inside the settings."""
    for part in location:
        kind = next(iter(tables_of(kind.model_fields[part].annotation)))
    return kind


def tables_of(annotation: Any) -> list[type[Table]]:
    """Tables that a field may hold."""
    return [c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, Table)]


def _paths(kind: type[Table], prefix: str = "") -> list[str]:
    """Dotted names of all keys and tables."""
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(prefix + name)
        for table in tables_of(field.annotation)[:1]:
            paths += _paths(table, f"{prefix}{name}.")
    return paths
