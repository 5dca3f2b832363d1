"""``[labels]``: under which keys a file has its labels, and in which units. One table and one syntax for all commands.

A source is text: ``KEY``, ``KEY:UNIT``, or ``:UNIT`` (the usual key, in another unit). A minus before the unit says
that the sign is the opposite of ubmd's: ``:-kbar`` is a stress that is positive under compression.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator

from ubmd.spelling import distance, nearest

LABEL_NAMES = ("energy", "forces", "stress", "virial")
"""what a source may be given for; a virial is read as a stress"""

DEFAULT_UNITS = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3", "virial": "eV"}
ENERGY_UNITS = ("eV", "meV", "kcal/mol", "kJ/mol", "Ha", "Ry")
LENGTH_UNITS = ("Å", "nm", "Bohr")
PRESSURE_UNITS = ("GPa", "MPa", "kbar", "bar", "Pa")

_ALIASES = {
    **{"Hartree": "Ha", "hartree": "Ha", "Rydberg": "Ry", "rydberg": "Ry", "kB": "kbar"},
    **{"A": "Å", "Ang": "Å", "Angstrom": "Å", "angstrom": "Å", "bohr": "Bohr"},
}
# The ones that errors list: every energy may stand with every length.
_LISTED = {
    "energy": ENERGY_UNITS,
    "forces": ("eV/Å", "meV/Å", "kcal/mol/Å", "kJ/mol/Å", "kJ/mol/nm", "Ha/Bohr", "Ry/Bohr"),
    "stress": ("eV/Å^3", *PRESSURE_UNITS, "Ha/Bohr^3", "Ry/Bohr^3"),
    "virial": ENERGY_UNITS,
}
_IN_SENTENCES = {"energy": "an energy", "forces": "forces", "stress": "a stress", "virial": "a virial"}
_VALID = {
    "energy": ENERGY_UNITS,
    "forces": tuple(f"{energy}/{length}" for energy in ENERGY_UNITS for length in LENGTH_UNITS),
    "stress": (*PRESSURE_UNITS, *(f"{energy}/{length}^3" for energy in ENERGY_UNITS for length in LENGTH_UNITS)),
    "virial": ENERGY_UNITS,
}


@dataclass(frozen=True)
class Source:
    """Where a file has a label."""

    unit: str
    """in its usual spelling"""
    key: str | None = None
    """None: the usual keys"""
    opposite: bool = False
    """the sign is the opposite of ubmd's"""

    @property
    def told(self) -> str:
        """Unit and sign in a sentence."""
        return f"{self.unit}, opposite sign" if self.opposite else self.unit


def parse_sources(labels: Mapping[str, str]) -> dict[str, Source]:
    """Label -> where a file has it; ValueError for a label or a unit that does not exist, with the nearest one."""
    sources = {label: _parse(label, text) for label, text in labels.items()}
    for name, other in (("stress", "virial"), ("virial", "stress")):
        if name in sources and other in sources and sources[name].key is None and sources[other].key is not None:
            raise ValueError(
                f"labels.{name} = {labels[name]!r} has no effect beside labels.{other} = {labels[other]!r}, which is "
                "where the stress is read from; remove one of them"
            )
    return sources


def _parse(label: str, text: str) -> Source:
    if label not in LABEL_NAMES:
        near = min(LABEL_NAMES, key=lambda name: distance(label, name))
        raise ValueError(f"there is no label '{label}', only {', '.join(LABEL_NAMES)}; the nearest is '{near}'")
    key, colon, unit = text.rpartition(":") if ":" in text else (text, "", "")
    key, unit = key.strip(), unit.strip()
    opposite = unit.startswith("-")
    if (not key and not colon) or (colon and not unit):
        raise ValueError(
            f"labels.{label} = {text!r} must be 'KEY', 'KEY:UNIT', or ':UNIT' for the usual key in another unit"
        )
    if opposite and label == "energy":
        raise ValueError(f"labels.energy = {text!r}: an energy has no other sign; remove the minus before the unit")
    named = unit.removeprefix("-").strip()
    return Source(_unit(label, named, text) if named else DEFAULT_UNITS[label], key or None, opposite)


def _unit(label: str, name: str, text: str) -> str:
    """A unit in its usual spelling; ValueError with the nearest one."""
    unit = _usual_spelling(name)
    if unit in _VALID[label]:
        return unit
    near = nearest(unit, _VALID[label])
    meant = f" (did you mean '{near}'?)" if near else ""
    raise ValueError(
        f"labels.{label} = {text!r}: '{name}' is not a unit of {_IN_SENTENCES[label]}{meant}; known are "
        f"{', '.join(_LISTED[label])}"
    )


def _usual_spelling(name: str) -> str:
    """'Hartree/bohr' as 'Ha/Bohr', 'eV/A3' and 'eV/Å³' as 'eV/Å^3'."""
    parts = unicodedata.normalize("NFKC", name).split("/")
    cubed = len(parts) > 1 and parts[-1].endswith("3")
    if cubed:
        parts[-1] = parts[-1].removesuffix("3").removesuffix("**").removesuffix("^")
    return "/".join(_ALIASES.get(part, part) for part in parts) + ("^3" if cubed else "")


def _check(labels: dict[str, str]) -> dict[str, str]:
    parse_sources(labels)
    return labels


LabelSources = Annotated[dict[str, str], AfterValidator(_check)]
LABELS = (
    "where files have their labels, if not under a usual key in eV, eV/Å, eV/Å^3: label (energy, forces, stress, "
    'virial) -> "KEY", "KEY:UNIT" or ":UNIT" (usual key), e.g. {energy = "qm_energy:Ha", stress = ":-kbar"}; a minus '
    "before the unit: the opposite sign, such as a stress that is positive under compression"
)


def gather_labels(values: Any, strict: bool = True) -> Any:
    """Settings in which tables ``labels`` of [start] and [test], as earlier versions had them, are the one of the top.

    Args:
        values: tables of a settings file; they are not changed.
        strict: ValueError if these tables differ; else the first one counts, that of the top before the others.
    """
    if not isinstance(values, dict):
        return values
    values, given = dict(values), {}
    if isinstance(values.get("labels"), dict) and values["labels"]:
        given["labels"] = values["labels"]
    for name in ("start", "test"):
        table = values.get(name)
        if not isinstance(table, dict) or not isinstance(table.get("labels"), dict):
            continue
        if table["labels"]:
            given[f"{name}.labels"] = table["labels"]
        values[name] = {key: value for key, value in table.items() if key != "labels"}
    for name in list(given)[1:]:
        first = next(iter(given))
        if strict and given[name] != given[first]:
            raise ValueError(
                f"{first} and {name} differ: write one table [labels], which holds for all files of the run, and "
                "rename keys in the others"
            )
    return values | {"labels": next(iter(given.values()))} if given else values
