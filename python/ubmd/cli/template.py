"""The commented settings file of ``ubmd init``, made from the settings' own descriptions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic.fields import FieldInfo

from ubmd.settings import RunSettings, Table, TrainSettings

if TYPE_CHECKING:
    from ubmd.learning.proposal import Suggestion

_WIDTH = 100

# Keys without a default: the values of a run that works as soon as the file and the reference are there.
_EXAMPLES: dict[str, Any] = {
    "run_dir": "my_run",
    "start.file": "start.extxyz",
    "reference.calculator": "ase.calculators.emt:EMT",
    "crystal.structure": "crystal.extxyz",
    "crystal.cutoffs": {"2": 5.0, "3": 4.0, "4": 4.0},
    "training_file": "train.extxyz",
    "output_dir": "my_model",
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
_SHORT_DYNAMIC = (
    "run_dir",
    "crystal.structure",
    "crystal.cutoffs",
    "start.repeat",
    "reference.calculator",
    "reference.arguments",
    "dynamic.temperatures",
    "dynamic.steps",
    "dynamic.timestep",
    "dynamic.labels",
)
_SHORT_TRAINING = (
    "training_file",
    "validation_share",
    "output_dir",
    "model.cutoff",
    "training.epochs",
    "training.batch_size",
    "uncertainty.alpha",
)

_HEAD = "# Settings of an active-learning run: ubmd check {name}, then ubmd run {name}\n"
_DYNAMIC_HEAD = "# Settings of dynamic training: ubmd check {name}, then ubmd run {name}\n"
_TRAINING_HEAD = "# Settings of a training: ubmd train {name}\n"
_LONG_HEAD = """\
# A line that begins with '# key =' shows a default: remove the '# ' to change it.
# For completion and help while you type in VS Code (extension 'Even Better TOML'): {schema} > ubmd.schema.json
# in this folder, and as the first line of this file: #:schema ./ubmd.schema.json
"""
_SHORT_HEAD = """\
# The keys that most people set, with their defaults. All keys: ubmd init {more}.
"""


Filled = Mapping[str, "Suggestion"]
"""dotted key -> value for it, with its reason"""
_NOTHING: Filled = {}


def run_template(name: str = "settings.toml", filled: Filled = _NOTHING) -> str:
    """TOML text for `RunSettings`: required and ``filled`` keys with values, all others commented, with defaults."""
    head = _HEAD.format(name=name) + _LONG_HEAD.format(schema="ubmd schema")
    return head + "\n".join(_table_lines(RunSettings, "", filled)) + "\n"


def dynamic_template(name: str = "settings.toml", filled: Filled = _NOTHING) -> str:
    """The same for `DynamicRunSettings`, with a crystal; what is for networks is commented out."""
    from ubmd.settings.dynamic import DynamicRunSettings

    head = _DYNAMIC_HEAD.format(name=name) + _LONG_HEAD.format(schema="ubmd schema dynamic")
    return head + "\n".join(_table_lines(DynamicRunSettings, "", filled, ("crystal",))) + "\n"


def training_template(name: str = "settings.toml", filled: Filled = _NOTHING) -> str:
    """The same for `TrainSettings`, with a network."""
    head = _TRAINING_HEAD.format(name=name) + _LONG_HEAD.format(schema="ubmd schema train")
    return head + "\n".join(_table_lines(TrainSettings, "", filled)) + "\n"


def short_template(name: str = "settings.toml", filled: Filled = _NOTHING) -> str:
    """TOML text with the keys that most people set, with example values or their defaults."""
    return _HEAD.format(name=name) + _short(RunSettings, _SHORT, "all.toml, or ubmd schema", filled)


def short_dynamic_template(name: str = "settings.toml", filled: Filled = _NOTHING) -> str:
    """The same for `DynamicRunSettings`, with a crystal."""
    from ubmd.settings.dynamic import DynamicRunSettings

    more = "all.toml --dynamic, or ubmd schema dynamic"
    return _DYNAMIC_HEAD.format(name=name) + _short(DynamicRunSettings, _SHORT_DYNAMIC, more, filled)


def short_training_template(name: str = "settings.toml", filled: Filled = _NOTHING) -> str:
    """The same for `TrainSettings`, with a network."""
    more = "all.toml --train, or ubmd schema train"
    return _TRAINING_HEAD.format(name=name) + _short(TrainSettings, _SHORT_TRAINING, more, filled)


def _short(kind: type[Table], usual: Sequence[str], more: str, filled: Filled) -> str:
    """The usual keys and those that are filled in, in the order of the settings."""
    lines: list[str] = []
    shown = ""
    for path in sorted({*usual, *filled}, key=_order(kind)):
        *tables, key = path.split(".")
        inner, table = kind, ".".join(tables)
        for part in tables:
            inner = _table_of(inner.model_fields[part]) or inner
        if table != shown:
            shown = table
            lines += ["", *_comment(inner.__doc__ or ""), f"[{table}]"]
        lines += _key_lines(path, key, inner.model_fields[key], filled, mark="")
    return _SHORT_HEAD.format(more=more) + "\n".join(lines) + "\n"


def _order(kind: type[Table]) -> Callable[[str], list[tuple[bool, int]]]:
    """Sorts dotted keys as the settings do, keys of a table before the tables in it."""

    def place(path: str) -> list[tuple[bool, int]]:
        found, table = [], kind
        for part in path.split("."):
            inner = _table_of(table.model_fields[part])
            found.append((inner is not None, list(table.model_fields).index(part)))
            table = inner or table
        return found

    return place


def _table_lines(kind: type[Table], name: str, filled: Filled, wanted: tuple[str, ...] = ()) -> list[str]:
    """Header, keys and sub-tables of one table; of those that are off by default only the ``wanted`` ones count."""
    lines: list[str] = []
    if name:
        lines += ["", *_comment(kind.__doc__ or ""), f"[{name}]"]
    tables = {key: _table_of(field) for key, field in kind.model_fields.items()}
    for key, field in kind.model_fields.items():
        if tables[key] is None:
            lines += _key_lines(f"{name}.{key}" if name else key, key, field, filled)
    for key, table in tables.items():
        if table is not None:
            path = f"{name}.{key}" if name else key
            on = key in wanted or not _is_off(kind.model_fields[key])
            inner = _table_lines(table, path, filled)
            lines += inner if on else [line if not line or line.startswith("#") else f"# {line}" for line in inner]
    return lines


def _is_off(field: FieldInfo) -> bool:
    """Whether a table is off by default; it is then commented out altogether."""
    return field.default is None and field.default_factory is None and not field.is_required()


def _table_of(field: FieldInfo) -> type[Table] | None:
    """The settings table of a field (also of ``Table | None``), or None for a plain key."""
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Table)), None)


def _key_lines(path: str, key: str, field: FieldInfo, filled: Filled, mark: str = "# ") -> list[str]:
    """A key with its description; ``mark`` comes before defaults."""
    comment = _comment(field.description or "")
    if path in filled:
        return [*comment, *_comment(f"Here: {filled[path].reason}."), _assignment(key, filled[path].value)]
    instead = path == "start.file" and "start.labels" in filled
    if field.is_required() or (field.examples and not instead):
        return [*comment, _assignment(key, field.examples[0] if field.examples else _EXAMPLES[path])]
    default = field.get_default(call_default_factory=True)
    if default is None:
        return [*comment, f"# {key} = ..."]
    return [*comment, f"{mark}{_assignment(key, default)}"]


def _assignment(key: str, value: Any) -> str:
    """``key = value`` on one line."""
    if isinstance(value, dict):
        return f"{key} = {{{', '.join(f'{k} = {v}' for k, v in value.items())}}}"
    if isinstance(value, tuple):
        return f"{key} = [{', '.join(tomli_w.dumps({'x': v}).strip().removeprefix('x = ') for v in value)}]"
    return tomli_w.dumps({key: value}).strip()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent="# ", subsequent_indent="# ")
