"""Labels of a frame in a file: under which keys they are, whether these agree, and what looks wrong with them.

The rule for files (`read_structures`):

- Energy, forces and stress are read from ``energy``, ``forces``, ``stress``, or from ``REF_energy``, ``REF_forces``,
  ``REF_stress``. Where a frame has both they must agree.
- A virial (``virial``, ``virials``, ``REF_virial``, ``REF_virials``; eV; 9 numbers, or 6: xx yy zz yz xz xy, except
  under ``virial``) of a structure that is periodic in some direction is the stress -virial/volume. Beside a stress it
  must agree with it.
- All labels of a frame come from the keys with REF_, or all from those without.
- ``energy`` is used, not ``free_energy``, which is read only where there is no ``energy``.
- A mapping, e.g. ``{"energy": "dft_energy"}``, overrides all that for the labels that it names.
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

from ubmd.data.geometry import check_apart, check_cell
from ubmd.data.periodicity import has_stress
from ubmd.errors import DataError
from ubmd.settings import check_label_names
from ubmd.spelling import nearest

LABELS = ("energy", "forces", "stress")
EV_PER_A3_IN_MPA = 1000 / GPa
_UNITS = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3"}
_FAMILIES = ("", "REF_")
_VIRIALS = ("virial", "virials")
_PLAIN = {"energy": ("energy",), "forces": ("forces",), "stress": ("stress",)}
_KEYS = {"energy": ("energy", "free_energy"), "forces": ("forces",), "stress": ("stress", *_VIRIALS)}
_KNOWN = {family + key for family in _FAMILIES for keys in _KEYS.values() for key in keys}
# Numbers that differ by less are the same, written with fewer digits: absolute, and relative to the largest.
_ROUNDING = {"energy": (1e-4, 1e-8), "forces": (1e-4, 1e-6), "stress": (1e-5, 1e-3)}


@dataclass(frozen=True)
class Frame:
    """A frame's structure with its labels, where each was found, and what a reader should know about it."""

    atoms: Atoms
    sources: dict[str, str]
    """label -> key"""
    free_energy: float | None = None
    """free energy minus energy, eV/atom, where both are given"""
    unused: dict[str, str] = field(default_factory=dict)
    """virial's key -> why it is not a label"""


@dataclass(frozen=True)
class _Found:
    key: str
    family: str
    value: Any


def take_labels(atoms: Atoms, mapping: Mapping[str, str], *, compare: bool = True, missing_ok: bool = False) -> Frame:
    """A copy whose calculator holds the labels.

    Keys that labels are known by are removed from it, those of the labels that were not chosen, too: they would be
    wrong as soon as the atoms move.

    Args:
        atoms: as ASE has read it.
        mapping: label (energy, forces, stress, or virial) -> key of ``atoms.info`` or ``atoms.arrays``.
        compare: see `read_structures`.
        missing_ok: a key of the mapping may be missing.

    Raises:
        DataError: labels that contradict each other, lack a key of the mapping, or have a wrong shape.
    """
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    atoms = atoms.copy()
    places = (results, atoms.arrays, atoms.info)
    free = _excess(places, len(atoms)) if compare and "energy" not in mapping else None
    unused = _unused(atoms) if compare else {}
    found = {
        label: _mapped(label, mapping, places, atoms, missing_ok)
        if label in mapping or (label == "stress" and "virial" in mapping)
        else _candidates(label, places, atoms, unused, compare)
        for label in LABELS
    }
    found = {label: values for label, values in found.items() if values}
    if compare:
        _check_agreement(found, mapping)
    chosen = _choose(found, mapping, compare)
    for key in {*_KNOWN, *(item.key for item in chosen.values())}:
        for place in places:
            place.pop(key, None)
    for key, value in results.items():  # other results (dipole, charges, ...) stay with the structure
        (atoms.arrays if np.shape(value)[:1] == (len(atoms),) else atoms.info)[key] = value
    if chosen:
        atoms.calc = SinglePointCalculator(atoms, **{label: item.value for label, item in chosen.items()})
    return Frame(atoms, {label: item.key for label, item in chosen.items()}, free, unused)


def _value(places: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((place[key] for place in places if place.get(key) is not None), None)


def _excess(places: Sequence[Mapping[str, Any]], n_atoms: int) -> float | None:
    """Free energy minus energy per atom, eV, if a frame has both."""
    energies = [_value(places, key) for key in ("free_energy", "energy")]
    if any(value is None or np.size(value) != 1 for value in energies):
        return None
    free, energy = (shaped("energy", value, n_atoms) for value in energies)
    return float(free - energy) / n_atoms


def _unused(atoms: Atoms) -> dict[str, str]:
    """Virials that cannot become a stress, and why."""
    reasons = {}
    for key in (family + name for family in _FAMILIES for name in _VIRIALS):
        if key in atoms.arrays:
            reasons[key] = "it is given per atom"
        elif key in atoms.info and not has_stress(atoms):
            reasons[key] = "a stress needs a cell with a volume that is periodic in some direction"
    return reasons


def _mapped(
    label: str, mapping: Mapping[str, str], places: Sequence[Mapping[str, Any]], atoms: Atoms, missing_ok: bool
) -> list[_Found]:
    """The label under the key that the mapping names; a stress from either of two."""
    found = []
    for name in (label, "virial") if label == "stress" else (label,):
        if name not in mapping:
            continue
        key = mapping[name]
        value = _value(places, key)
        if value is None:
            if missing_ok:
                continue
            meant = nearest(key, [known for place in places for known in place])
            hint = f"; did you mean '{meant}'?" if meant else "."
            raise DataError(f"there is no '{key}', which the mapping names for the {name}{hint}")
        _check_kind(name, key)
        found.append(_Found(key, _family(key, name), _converted(name, value, atoms)))
    return found


def _check_kind(name: str, key: str) -> None:
    """DataError if a virial is named as stress, or a stress as virial: both have the same shape."""
    kinds = {"stress": ("stress",), "virial": _VIRIALS}
    other = "virial" if name == "stress" else "stress"
    if name in kinds and key.lower().endswith(kinds[other]):
        raise DataError(f"'{key}' is a {other}, not a {name}: name it with {other}, as in --label {other}={key}.")


def _candidates(
    label: str, places: Sequence[Mapping[str, Any]], atoms: Atoms, unused: Mapping[str, str], compare: bool
) -> list[_Found]:
    """The label under all keys that it is known by, the preferred one first."""
    found = []
    for family in _FAMILIES:
        for name in (_KEYS if compare else _PLAIN)[label]:
            key = family + name
            value = None if key in unused else _value(places, key)
            if value is not None:
                found.append(_Found(key, family, _converted("virial" if name in _VIRIALS else label, value, atoms)))
                if label == "energy" or not compare:
                    break  # a free energy is not a second energy
    return found if compare else found[:1]


def _converted(name: str, value: Any, atoms: Atoms) -> Any:
    """A label in ubmd's shape; a virial as stress."""
    if name != "virial":
        return shaped(name, value, len(atoms))
    if not has_stress(atoms):
        raise DataError("a virial needs a cell with a volume that is periodic in some direction; remove it.")
    return -shaped("virial", value, len(atoms)) / atoms.get_volume()


def _family(key: str, label: str) -> str:
    """What stands before the label in a key: REF_ of REF_energy; of dft_E, where there is no label, the key itself."""
    names = sorted(_VIRIALS if label == "virial" else _KEYS[label], key=len, reverse=True)
    return next((key.removesuffix(name) for name in names if key.endswith(name)), key)


def _check_agreement(found: Mapping[str, Sequence[_Found]], mapping: Mapping[str, str]) -> None:
    """DataError if a label has two values, or labels without a given key come from two sources."""
    for label, items in found.items():
        for other in items[1:]:
            if _differ(label, items[0].value, other.value):
                both = {name: values for name, values in found.items() if len(values) > 1}
                last = {name: values[-1].key for name, values in both.items()}
                raise DataError(f"{_difference(label, items[0], other)}; say which one to use, e.g. {_advice(last)}.")
    free = _free(found, mapping)
    if free and not set.intersection(*({item.family for item in items} for items in free.values())):
        keys = {label: items[0].key for label, items in free.items()}
        first, second = _first_two(free)
        raise DataError(
            f"the {first} is under '{keys[first]}', but the {second} under '{keys[second]}': two sources may be two "
            f"levels of theory; if they belong together, say so: {_advice(keys)}."
        )


def _free(found: Mapping[str, Sequence[_Found]], mapping: Mapping[str, str]) -> dict[str, Sequence[_Found]]:
    """Labels whose key is not given by the user."""
    named = {"stress" if name == "virial" else name for name in mapping}
    return {label: items for label, items in found.items() if label not in named}


def _first_two(found: Mapping[str, Sequence[_Found]]) -> tuple[str, str]:
    """Two labels without a common source."""
    labels = list(found)
    families = {label: {item.family for item in found[label]} for label in labels}
    return next((a, b) for k, a in enumerate(labels) for b in labels[k + 1 :] if not families[a] & families[b])


def _differ(label: str, first: Any, second: Any) -> bool:
    absolute, relative = _ROUNDING[label]
    return bool(np.abs(np.asarray(first) - second).max() > absolute + relative * np.abs(first).max())


def _difference(label: str, first: _Found, second: _Found) -> str:
    """What differs, with numbers."""
    unit = _UNITS[label]
    if label == "energy":
        return f"'{first.key}' is {first.value:.8g} {unit}, but '{second.key}' is {second.value:.8g} {unit}"
    largest = float(np.abs(first.value - second.value).max())
    text = f"the {label} under '{first.key}' and '{second.key}' differ by up to {largest:.3g} {unit}"
    kinds = {key.endswith(_VIRIALS) for key in (first.key, second.key)}
    return f"{text} (stress = -virial/volume)" if label == "stress" and len(kinds) == 2 else text


def _advice(keys: Mapping[str, str]) -> str:
    """How to name the keys of labels, on the command line and in settings."""
    named = {"virial" if label == "stress" and key.endswith(_VIRIALS) else label: key for label, key in keys.items()}
    options = " ".join(f"--label {label}={key}" for label, key in named.items())
    table = ", ".join(f'{label} = "{key}"' for label, key in named.items())
    return f"{options} (in settings: labels = {{{table}}})"


def _choose(found: Mapping[str, Sequence[_Found]], mapping: Mapping[str, str], compare: bool) -> dict[str, _Found]:
    """One source for each label: the same for all whose key is not given by the user."""
    if not compare:
        return {label: items[0] for label, items in found.items()}
    free = _free(found, mapping).values()
    common = set.intersection(*({item.family for item in items} for items in free)) if free else set()
    family = next((family for family in _FAMILIES if family in common), None)
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


def check_mapping(mapping: Mapping[str, str] | None) -> None:
    """DataError if a mapping names a label that does not exist, with the nearest one that does."""
    try:
        check_label_names(dict(mapping or {}))
    except ValueError as error:
        raise DataError(f"{error}.") from None


# ---------------------------------------------------------------------------------------------- remarks

_NOTICEABLE = 1e-4  # eV/atom between free energy and energy
_STRANGE_STRESS = 100 * GPa  # eV/Å^3
_TYPICAL_STRESS = 2.0  # GPa, of solids with displaced atoms
_STRESS_UNITS = {"GPa": 1.0, "kbar": 0.1, "MPa": 1e-3, "bar": 1e-4}


def label_remarks(frames: Sequence[Frame], mapping: Mapping[str, str]) -> Iterator[str]:
    """Sentences on what is not an error in the frames of a file, but may be a mistake."""
    yield from _mixed_sources(frames, mapping)
    for key in sorted({key for frame in frames for key in frame.unused}):
        without = [frame.unused[key] for frame in frames if key in frame.unused]
        yield f"'{key}' of {len(without)} frame{'s' if len(without) > 1 else ''} is not used: {without[0]}."
    excess = np.array([frame.free_energy for frame in frames if frame.free_energy is not None])
    if len(excess) and np.abs(excess).max() > _NOTICEABLE:
        yield (
            f"'energy' is read, which differs from 'free_energy' by up to {1000 * np.abs(excess).max():.3g} meV/atom; "
            "forces are derivatives of the free energy (smeared electrons), which `ubmd run` also learns: "
            f"{_advice({'energy': 'free_energy'})}."
        )
    yield from _strange_stress([frame.atoms for frame in frames])
    yield from _no_stress([frame.atoms for frame in frames])


def _mixed_sources(frames: Sequence[Frame], mapping: Mapping[str, str]) -> Iterator[str]:
    """Labels without a given key, beside others that come from elsewhere."""
    named = {"stress" if name == "virial" else name for name in mapping}
    for frame in frames:
        families = {label: _family(key, label) for label, key in frame.sources.items()}
        for label in families:
            other = next((name for name in named & set(families) if families[name] != families[label]), None)
            if label not in named and other is not None:
                keys = frame.sources
                yield (
                    f"the {other} is read from '{keys[other]}', the {label} from '{keys[label]}'; name its key, too, "
                    "if that is another level of theory."
                )
                return


def _no_stress(structures: Sequence[Atoms]) -> Iterator[str]:
    """Programs that did not compute a stress may write zeros."""
    zero = [
        atoms
        for atoms in structures
        if atoms.calc is not None
        and not np.any(atoms.calc.results.get("stress", 1.0))
        and np.any(atoms.calc.results.get("forces", 0.0))
    ]
    if zero:
        yield (
            f"the stress of {len(zero)} frame{'s' if len(zero) > 1 else ''} is exactly zero, but the forces are not: "
            "if it was not computed, remove it from the file; a model would learn it."
        )


def _strange_stress(structures: Sequence[Atoms]) -> Iterator[str]:
    """A stress larger than any crystal sustains is in another unit: which, follows from its size."""
    sizes = [
        float(np.abs(atoms.calc.results["stress"]).max())
        for atoms in structures
        if atoms.calc is not None and "stress" in atoms.calc.results
    ]
    if not sizes or max(sizes) <= _STRANGE_STRESS:
        return
    typical = max(float(np.median(sizes)), 1e-300) / _TYPICAL_STRESS
    unit = min(_STRESS_UNITS, key=lambda name: abs(np.log(typical * _STRESS_UNITS[name])))
    yield (
        f"stresses of up to {max(sizes):.3g} eV/Å^3 = {max(sizes) / GPa:.3g} GPa are read; judging by their size "
        f"they are in another unit, perhaps {unit}, or virials in eV. Convert them to eV/Å^3 (1 GPa = {GPa:.6f} "
        "eV/Å^3), or name virials with --label virial=KEY."
    )


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
