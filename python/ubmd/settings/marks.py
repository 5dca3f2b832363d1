"""What a setting affects, declared once, together with the setting.

A field is declared as ``name: Annotated[type, NOTHING] = Field(...)``; a field without a mark affects labels. The
marks determine which settings may change when a run is resumed, and which values enter the keys of its stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from ubmd.settings.table import Table, tables_of

DEFAULT = object()


@dataclass(frozen=True)
class Mark:
    """The mark of one field."""

    affects: Literal["nothing", "labels", "first labels"] = "labels"
    """nothing: no label depends on it, or only how many there will be, so that it may change when a run is resumed;
    labels: it may change only where a run is taken back to (--from); first labels: not even there"""
    in_key: bool = True
    """whether it is among the key's values of its table; False: it enters the key in another way, or affects nothing"""
    late: bool = False
    """added to its table after runs had been made: left out of keys at its value `before`, so that these keep theirs"""
    before: Any = DEFAULT
    """what a late setting is in runs that were made without it; also its default, unless that is another by now"""
    version: int = 1
    """of the default; raised when the default changes"""


NOTHING = Mark("nothing", in_key=False)
FIRST_LABELS = Mark("first labels")
ELSEWHERE = Mark(in_key=False)
LATE = Mark(late=True)


def late(before: Any) -> Mark:
    """The mark of a late setting whose default is not what runs without it have done, which is ``before``."""
    return Mark(late=True, before=before, version=2)


def mark_of(field: FieldInfo) -> Mark:
    """The mark of a field."""
    return next((entry for entry in field.metadata if isinstance(entry, Mark)), Mark())


def marks(kind: type[Table], prefix: str = "") -> Iterator[tuple[str, Mark]]:
    """(dotted key, mark) of all settings of a kind of run.

    A table with a mark other than that of labels passes it on to its fields, except those that have one themselves.
    """
    for name, field in kind.model_fields.items():
        own, inner = mark_of(field), tables_of(field.annotation)
        if own.affects == "nothing" or not inner:
            yield prefix + name, own
            continue
        for key, mark in marks(inner[0], f"{prefix}{name}."):
            yield key, own if mark == Mark() else mark


def mark_at(kind: type[Table], key: str) -> Mark:
    """The mark that holds for a dotted key, which may lie below a setting (``reference.arguments.path``)."""
    found = [mark for name, mark in marks(kind) if key == name or key.startswith(name + ".")]
    return found[0] if found else Mark()


def is_set(table: Table, key: str) -> bool:
    """Whether a dotted key was given, rather than left to its default."""
    name, _, rest = key.partition(".")
    inner = getattr(table, name)
    if rest and isinstance(inner, Table):
        return name in table.model_fields_set and is_set(inner, rest)
    return name in table.model_fields_set


def key_values(table: Table) -> dict[str, Any]:
    """What a table contributes to the key of a stage: the values that affect its result, as JSON."""
    fields = type(table).model_fields
    elsewhere = {name: True for name, field in fields.items() if not mark_of(field).in_key}
    return table.model_dump(mode="json", exclude=_late_as_before(table) | elsewhere)


def with_late(values: dict[str, Any], kind: type[Table]) -> dict[str, Any]:
    """The settings of a run as JSON, with late ones that it was made without as they were `before`."""
    found = dict(values)
    for name, field in kind.model_fields.items():
        mark, inner = mark_of(field), tables_of(field.annotation)
        if mark.before is not DEFAULT:
            found.setdefault(name, mark.before)
        if inner and isinstance(found.get(name), dict):
            found[name] = with_late(found[name], inner[0])
    return found


def before(field: FieldInfo) -> Any:
    """What a late setting is in runs without it."""
    mark = mark_of(field)
    return field.get_default(call_default_factory=True) if mark.before is DEFAULT else mark.before


def _late_as_before(table: Table) -> dict[str, Any]:
    """Late settings as they were before them, those of tables in it too, as pydantic's ``exclude``."""
    found: dict[str, Any] = {}
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        if mark_of(field).late and value == before(field):
            found[name] = True
        elif isinstance(value, Table) and (inner := _late_as_before(value)):
            found[name] = inner
    return found
