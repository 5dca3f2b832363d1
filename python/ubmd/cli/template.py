"""The commented settings file of ``ubmd init``, made from the settings' own descriptions."""

from __future__ import annotations

import textwrap
from typing import Any

import tomli_w
from pydantic.fields import FieldInfo

from ubmd.settings import RunSettings, Table

_WIDTH = 100

# Keys without a default: the values of a run that works as soon as the file and the reference are there.
_EXAMPLES: dict[str, Any] = {
    "run_dir": "my_run",
    "start.file": "start.extxyz",
    "reference.calculator": "ase.calculators.emt:EMT",
    "crystal.structure": "crystal.extxyz",
    "crystal.cutoffs": {"2": 5.0, "3": 4.0, "4": 4.0},
}


# What most people set; the others are for later.
_SHORT = (
    "run_dir",
    "start.file",
    "reference.calculator",
    "reference.arguments",
    "model.cutoff",
    "md.replicas",
    "md.steps",
    "md.timestep",
    "md.temperature",
    "bias.force",
    "selection.batch",
    "loop.labels",
    "loop.threshold",
)

_HEAD = "# Settings of an active-learning run: ubmd check {name}, then ubmd run {name}\n"
_DYNAMIC_HEAD = "# Settings of dynamic training: ubmd check {name}, then ubmd run {name}\n"
_LONG_HEAD = """\
# A line that begins with '# key =' shows a default: remove the '# ' to change it.
# For completion and help while you type in VS Code (extension 'Even Better TOML'): {schema} > ubmd.schema.json
# in this folder, and as the first line of this file: #:schema ./ubmd.schema.json
"""
_SHORT_HEAD = """\
# The keys that most people set, with their defaults. All keys: ubmd init all.toml, or ubmd schema.
"""


def run_template(name: str = "settings.toml") -> str:
    """TOML text for `RunSettings`: required keys with example values, all others commented out with their defaults."""
    head = _HEAD.format(name=name) + _LONG_HEAD.format(schema="ubmd schema")
    return head + "\n".join(_table_lines(RunSettings, "")) + "\n"


def dynamic_template(name: str = "settings.toml") -> str:
    """The same for `DynamicRunSettings`, with a crystal; what is for networks is commented out."""
    from ubmd.settings.dynamic import DynamicRunSettings

    head = _DYNAMIC_HEAD.format(name=name) + _LONG_HEAD.format(schema="ubmd schema dynamic")
    return head + "\n".join(_table_lines(DynamicRunSettings, "", ("crystal",))) + "\n"


def short_template(name: str = "settings.toml") -> str:
    """TOML text with the keys that most people set, with example values or their defaults."""
    lines: list[str] = []
    table = ""
    for path in _SHORT:
        *tables, key = path.split(".")
        kind: type[Table] = RunSettings
        for part in tables:
            kind = _table_of(kind.model_fields[part]) or kind
        if tables and tables[0] != table:
            table = tables[0]
            lines += ["", *_comment(kind.__doc__ or ""), f"[{table}]"]
        field = kind.model_fields[key]
        needed = field.is_required() or field.examples
        value = _EXAMPLES[path] if needed else field.get_default(call_default_factory=True)
        lines += [*_comment(field.description or ""), _assignment(key, value)]
    return _HEAD.format(name=name) + _SHORT_HEAD + "\n".join(lines) + "\n"


def _table_lines(kind: type[Table], name: str, wanted: tuple[str, ...] = ()) -> list[str]:
    """Header, keys and sub-tables of one table; of those that are off by default only the ``wanted`` ones count."""
    lines: list[str] = []
    if name:
        lines += ["", *_comment(kind.__doc__ or ""), f"[{name}]"]
    tables = {key: _table_of(field) for key, field in kind.model_fields.items()}
    for key, field in kind.model_fields.items():
        if tables[key] is None:
            lines += _key_lines(f"{name}.{key}" if name else key, key, field)
    for key, table in tables.items():
        if table is not None:
            path = f"{name}.{key}" if name else key
            lines += _table_lines(table, path) if key in wanted else _sub_table(table, path, kind.model_fields[key])
    return lines


def _sub_table(kind: type[Table], name: str, field: FieldInfo) -> list[str]:
    """A table; one that is off by default is commented out altogether."""
    lines = _table_lines(kind, name)
    if field.default is None and field.default_factory is None and not field.is_required():
        lines = [line if not line or line.startswith("#") else f"# {line}" for line in lines]
    return lines


def _table_of(field: FieldInfo) -> type[Table] | None:
    """The settings table of a field (also of ``Table | None``), or None for a plain key."""
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Table)), None)


def _key_lines(path: str, key: str, field: FieldInfo) -> list[str]:
    comment = _comment(field.description or "")
    if field.is_required() or field.examples:
        return [*comment, _assignment(key, field.examples[0] if field.examples else _EXAMPLES[path])]
    default = field.get_default(call_default_factory=True)
    if default is None:
        return [*comment, f"# {key} = ..."]
    return [*comment, f"# {_assignment(key, default)}"]


def _assignment(key: str, value: Any) -> str:
    """``key = value`` on one line."""
    if isinstance(value, dict):
        return f"{key} = {{{', '.join(f'{k} = {v}' for k, v in value.items())}}}"
    if isinstance(value, tuple):
        return f"{key} = [{', '.join(tomli_w.dumps({'x': v}).strip().removeprefix('x = ') for v in value)}]"
    return tomli_w.dumps({key: value}).strip()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent="# ", subsequent_indent="# ")
