"""Labels of a frame in a file: under which keys they are, whether these agree, and in which units they are.

The rule for files (`read_structures`):

- Labels are read from the keys that they are known by (`ubmd.data.label_keys`): ``energy``, ``forces``, ``stress``, or
  the same with ``REF_`` or ``dft_``, and other spellings. Where a frame has several they must agree.
- A virial (eV; 9 numbers, or 6: xx yy zz yz xz xy, except under ``virial``) of a structure that is periodic in some
  direction is the stress -virial/volume. Beside a stress it must agree with it.
- All labels of a frame come from keys with the same prefix.
- ``energy`` is used, not ``free_energy``, which is read only where there is no ``energy``.
- A mapping (`ubmd.settings.labels`), e.g. ``{"energy": "dft_energy:Ha"}``, overrides all that for the labels whose keys
  it names. ``{"energy": ":Ha"}`` says in which unit the usual keys are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa

from ubmd.data import label_keys
from ubmd.data.geometry import check_apart, check_cell
from ubmd.data.label_keys import Places, family_of, is_virial, value_of
from ubmd.data.periodicity import has_stress
from ubmd.data.units import factor
from ubmd.errors import DataError
from ubmd.settings.labels import DEFAULT_UNITS, Source, parse_sources
from ubmd.spelling import nearest

LABELS = ("energy", "forces", "stress")
EV_PER_A3_IN_MPA = 1000 / GPa
# Numbers that differ by less are the same, written with fewer digits: absolute, and relative to the largest.
_ROUNDING = {"energy": (1e-4, 1e-8), "forces": (1e-4, 1e-6), "stress": (1e-5, 1e-3)}


@dataclass(frozen=True)
class Found:
    """One value of a label."""

    key: str
    family: str
    unit: str
    """unit and sign in the file, in a sentence"""
    value: Any
    """in ubmd's unit and sign"""


@dataclass(frozen=True)
class Frame:
    """A frame's structure with its labels, where each was found, and what a reader should know about it."""

    atoms: Atoms
    sources: dict[str, Found]
    """label -> what was taken"""
    free_energy: float | None = None
    """free energy minus energy, eV/atom, where both are given"""
    unused: dict[str, str] = field(default_factory=dict)
    """virial's key -> why it is not a label"""
    number: int = 0
    """in the file"""


def sources_of(mapping: Mapping[str, str] | None) -> dict[str, Source]:
    """A mapping of labels to keys and units, parsed; DataError for a label or a unit that does not exist."""
    try:
        return parse_sources(mapping or {})
    except ValueError as error:
        raise DataError(f"{error}.") from None


def take_labels(
    atoms: Atoms, mapping: Mapping[str, Source], *, compare: bool = True, missing_ok: bool = False, number: int = 0
) -> Frame:
    """A copy whose calculator holds the labels.

    Keys that labels are known by are removed from it, those of the labels that were not chosen, too: they would be
    wrong as soon as the atoms move.

    Args:
        atoms: as ASE has read it.
        mapping: label (energy, forces, stress, or virial) -> key of ``atoms.info`` or ``atoms.arrays``, unit and sign.
        compare: see `read_structures`.
        missing_ok: a key of the mapping may be missing.
        number: of the frame in its file.

    Raises:
        DataError: labels that contradict each other, lack a key of the mapping, or have a wrong shape.
    """
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    atoms = atoms.copy()
    if not (mapping or results or atoms.info or atoms.arrays.keys() - {"numbers", "positions"}):
        return Frame(atoms, {}, None, {}, number)
    places = (results, atoms.arrays, atoms.info)
    free = _excess(places, len(atoms), mapping.get("energy")) if compare else None
    unused = _unused(atoms) if compare else {}
    reader = _Reader(places, atoms, mapping, frozenset(unused), missing_ok)
    found = {label: list(reader.find(label, compare)) for label in LABELS}
    found = {label: values for label, values in found.items() if values}
    if compare:
        _check_agreement(found, mapping)
    chosen = _choose(found, mapping, compare)
    known = label_keys.known_keys(places, len(atoms)) if compare else label_keys.EXACT
    for key in {*known, *(item.key for item in chosen.values())}:
        for place in places:
            place.pop(key, None)
    for key, value in results.items():  # other results (dipole, charges, ...) stay with the structure
        (atoms.arrays if np.shape(value)[:1] == (len(atoms),) else atoms.info)[key] = value
    if chosen:
        atoms.calc = SinglePointCalculator(atoms, **{label: item.value for label, item in chosen.items()})
    return Frame(atoms, chosen, free, unused, number)


def _excess(places: Places, n_atoms: int, source: Source | None) -> float | None:
    """Free energy minus energy per atom, eV, if a frame has both and the mapping names neither."""
    if source is not None and source.key is not None:
        return None
    energies = [value_of(places, key) for key in (label_keys.FREE_ENERGY, "energy")]
    if any(value is None or np.size(value) != 1 for value in energies):
        return None
    free, energy = (shaped("energy", value, n_atoms) for value in energies)
    return float(free - energy) * (1.0 if source is None else factor(source)) / n_atoms


def _unused(atoms: Atoms) -> dict[str, str]:
    """Virials that cannot become a stress, and why."""
    names = {family + name for family in label_keys.FAMILIES for name in label_keys.VIRIALS}
    reasons = {key: "it is given per atom" for key in atoms.arrays if key.lower() in names}
    if not has_stress(atoms):
        reason = "a stress needs a cell with a volume that is periodic in some direction"
        reasons |= {key: reason for key in atoms.info if isinstance(key, str) and key.lower() in names}
    return reasons


@dataclass(frozen=True)
class _Reader:
    """Looks for the labels of one frame."""

    places: Places
    atoms: Atoms
    mapping: Mapping[str, Source]
    unused: frozenset[str]
    missing_ok: bool

    def find(self, label: str, compare: bool) -> Iterator[Found]:
        """The label under the keys that the mapping names; else under all that it is known by, the usual one first."""
        names = (label, "virial") if label == "stress" else (label,)
        named = [name for name in names if name in self.mapping and self.mapping[name].key is not None]
        for name in named:
            yield from self._mapped(name, self.mapping[name])
        if named:
            return
        if not compare:
            yield from self._plain(label)
            return
        for family in label_keys.FAMILIES:
            yield from self._of_family(family, label)

    def _plain(self, label: str) -> Iterator[Found]:
        """The label in a file of a run folder: the first that is there."""
        for key in label_keys.PLAIN[label]:
            value = value_of(self.places, key)
            if value is not None:
                yield self._found(label, key, value, None)
                return

    def _mapped(self, name: str, source: Source) -> Iterator[Found]:
        """The label under the key that the mapping names."""
        key = str(source.key)
        value = value_of(self.places, key)
        if value is None:
            if self.missing_ok:
                return
            meant = nearest(key, [known for place in self.places for known in place])
            hint = f"; did you mean '{meant}'?" if meant else "."
            raise DataError(f"there is no '{key}', which the mapping names for the {name}{hint}")
        _check_kind(name, key)
        yield self._found(name, key, value, source)

    def _of_family(self, family: str, label: str) -> Iterator[Found]:
        """The label under all keys with a prefix; a free energy only if there is no energy."""
        kinds = ("stress", "virial") if label == "stress" else (label,)
        names = [(kind, name) for kind in kinds for name in label_keys.NAMES[kind]]
        found = list(self._under(family, names))
        if not found and label == "energy":
            found = list(self._under(family, [("energy", label_keys.FREE_ENERGY)]))
        yield from found

    def _under(self, family: str, names: Iterable[tuple[str, str]]) -> Iterator[Found]:
        for kind, name in names:
            for key in label_keys.keys_of(self.places, family, name, len(self.atoms)):
                if key not in self.unused:
                    yield self._found(kind, key, value_of(self.places, key), self.mapping.get(kind))

    def _found(self, kind: str, key: str, value: Any, source: Source | None) -> Found:
        """A value in ubmd's shape, unit and sign; a virial as stress."""
        source = source or Source(DEFAULT_UNITS[kind])
        array = shaped(kind, value, len(self.atoms))
        if source != Source(DEFAULT_UNITS[kind], source.key):
            array = array * factor(source)
        if kind == "virial":
            if not has_stress(self.atoms):
                raise DataError("a virial needs a cell with a volume that is periodic in some direction; remove it.")
            array = -array / self.atoms.get_volume()
        return Found(key, family_of(key, kind), source.told, array)


def _check_kind(name: str, key: str) -> None:
    """DataError if a virial is named as stress, or a stress as virial: both have the same shape."""
    other = "virial" if name == "stress" else "stress"
    if name in ("stress", "virial") and (is_virial(key) if other == "virial" else key.lower().endswith("stress")):
        raise DataError(f"'{key}' is a {other}, not a {name}: name it with {other}, as in --label {other}={key}.")


def _check_agreement(found: Mapping[str, Sequence[Found]], mapping: Mapping[str, Source]) -> None:
    """DataError if a label has two values, or labels without a given key come from two sources."""
    for label, items in found.items():
        for other in items[1:]:
            if _differ(label, items[0].value, other.value):
                both = {name: values for name, values in found.items() if len(values) > 1}
                last = {name: values[-1].key for name, values in both.items()}
                raise DataError(f"{_difference(label, items[0], other)}; say which one to use, e.g. {advice(last)}.")
    free = _free(found, mapping)
    if free and not set.intersection(*({item.family for item in items} for items in free.values())):
        keys = {label: items[0].key for label, items in free.items()}
        first, second = _first_two(free)
        raise DataError(
            f"the {first} is under '{keys[first]}', but the {second} under '{keys[second]}': two sources may be two "
            f"levels of theory; if they belong together, say so: {advice(keys)}."
        )


def named_labels(mapping: Mapping[str, Source]) -> set[str]:
    """Labels whose key is given by the user."""
    return {"stress" if name == "virial" else name for name, source in mapping.items() if source.key is not None}


def _free(found: Mapping[str, Sequence[Found]], mapping: Mapping[str, Source]) -> dict[str, Sequence[Found]]:
    """Labels whose key is not given by the user."""
    named = named_labels(mapping)
    return {label: items for label, items in found.items() if label not in named}


def _first_two(found: Mapping[str, Sequence[Found]]) -> tuple[str, str]:
    """Two labels without a common source."""
    labels = list(found)
    families = {label: {item.family for item in found[label]} for label in labels}
    return next((a, b) for k, a in enumerate(labels) for b in labels[k + 1 :] if not families[a] & families[b])


def _differ(label: str, first: Any, second: Any) -> bool:
    absolute, relative = _ROUNDING[label]
    return bool(np.abs(np.asarray(first) - second).max() > absolute + relative * np.abs(first).max())


def _difference(label: str, first: Found, second: Found) -> str:
    """What differs, with numbers."""
    unit = DEFAULT_UNITS[label]
    if label == "energy":
        return f"'{first.key}' is {first.value:.8g} {unit}, but '{second.key}' is {second.value:.8g} {unit}"
    largest = float(np.abs(first.value - second.value).max())
    text = f"the {label} under '{first.key}' and '{second.key}' differ by up to {largest:.3g} {unit}"
    kinds = {is_virial(key) for key in (first.key, second.key)}
    return f"{text} (stress = -virial/volume)" if label == "stress" and len(kinds) == 2 else text


def advice(keys: Mapping[str, str]) -> str:
    """How to name the keys of labels, on the command line and in settings."""
    named = {"virial" if label == "stress" and is_virial(key) else label: key for label, key in keys.items()}
    options = " ".join(f"--label {label}={key}" for label, key in named.items())
    table = ", ".join(f'{label} = "{key}"' for label, key in named.items())
    return f"{options} (in settings: labels = {{{table}}})"


def _choose(found: Mapping[str, Sequence[Found]], mapping: Mapping[str, Source], compare: bool) -> dict[str, Found]:
    """One source for each label: the same for all whose key is not given by the user."""
    if not compare:
        return {label: items[0] for label, items in found.items()}
    free = _free(found, mapping).values()
    common = set.intersection(*({item.family for item in items} for items in free)) if free else set()
    family = next((family for family in label_keys.FAMILIES if family in common), None)
    return {label: next((i for i in items if i.family == family), items[0]) for label, items in found.items()}


def shaped(label: str, value: Any, n_atoms: int) -> Any:
    """A label as float64 in ASE's shape: energy scalar, forces [n, 3], stress or virial [6] (xx yy zz yz xz xy)."""
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise DataError(f"the {label} is not a number: {value!r}.") from None
    if label == "energy":
        if array.size != 1:
            raise DataError(f"the energy must be one number (eV), got {array.size}.")
        return float(array.reshape(()))
    if label == "forces":
        if array.size != 3 * n_atoms or (array.ndim == 2 and array.shape[1] != 3):
            raise DataError(f"forces must be {n_atoms} x 3 numbers (eV/Å), got the shape {array.shape}.")
        return array.reshape(n_atoms, 3)
    if array.shape == (6,):
        return array
    if array.size != 9:
        unit = "eV" if label == "virial" else "eV/Å^3"
        raise DataError(f"the {label} must be 6 (xx yy zz yz xz xy) or 9 numbers ({unit}), got {array.shape}.")
    full = array.reshape(3, 3)
    noise = 1e-3 * float(np.abs(full).max()) if label == "virial" else 1e-8
    if not np.allclose(full, full.T, rtol=1e-4, atol=noise, equal_nan=True):
        raise DataError(f"the {label} tensor is not symmetric.")
    full = 0.5 * (full + full.T) if label == "virial" else full
    return full[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


# ------------------------------------------------------------------------------------------ of structures


def check_structure(atoms: Atoms) -> None:
    """Raise DataError (without file name and frame number) if a structure or its labels cannot be used."""
    if len(atoms) == 0:
        raise DataError("there are no atoms.")
    if (atoms.numbers < 1).any():
        raise DataError(f"atom {int(np.argmax(atoms.numbers < 1))} has no element.")
    if not np.isfinite(atoms.positions).all():
        bad = int(np.argmax(~np.isfinite(atoms.positions).all(axis=1)))
        raise DataError(f"the position of atom {bad} is not a finite number.")
    check_cell(atoms)
    labels = labels_of(atoms)
    for label, value in labels.items():
        if not np.isfinite(value).all():
            raise DataError(f"NaN or infinity in the {label}; remove the frame or repeat its calculation.")
    if "stress" in labels and not has_stress(atoms):
        raise DataError("a stress needs a cell with a volume that is periodic in some direction; remove the stress.")


def labels_of(atoms: Atoms) -> dict[str, Any]:
    """Labels of a structure: any of energy (float, eV), forces [n, 3] (eV/Å), stress [6] (eV/Å^3).

    Raises:
        DataError: the calculator's results belong to other positions, cell or elements, or have a wrong shape.
    """
    if atoms.calc is None or not any(label in atoms.calc.results for label in LABELS):
        return {}
    changed = atoms.calc.check_state(atoms)
    if changed:
        raise DataError(f"the labels are out of date: {', '.join(changed)} changed after they were computed.")
    results = atoms.calc.results
    return {label: shaped(label, results[label], len(atoms)) for label in LABELS if results.get(label) is not None}


def check_labelled(structures: Sequence[Atoms], what: str) -> None:
    """Raise DataError unless there are structures, each valid and with energy and forces.

    Args:
        what: name of the set in the message, e.g. "training set".
    """
    if not structures:
        raise DataError(f"The {what} is empty; it needs at least one labelled structure.")
    for number, atoms in enumerate(structures):
        try:
            check_structure(atoms)
            check_apart(atoms)
            labels = labels_of(atoms)
        except DataError as error:
            raise DataError(f"{what}, structure {number}: {error}") from None
        for label in ("energy", "forces"):
            if label not in labels:
                raise DataError(f"{what}, structure {number}: no {label}; label it or remove it.")


def dataset_hash(structures: Iterable[Atoms]) -> str:
    """SHA-256 (hex) of elements, positions, cells, periodicity and labels, in the order of the structures."""
    digest = hashlib.sha256()
    for atoms in structures:
        labels = labels_of(atoms)
        digest.update(f"{len(atoms)} {''.join('FT'[int(p)] for p in atoms.pbc)} {sorted(labels)}\n".encode())
        arrays = [atoms.numbers, atoms.positions, np.asarray(atoms.cell), *(labels[key] for key in sorted(labels))]
        for array in arrays:
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
    return digest.hexdigest()
