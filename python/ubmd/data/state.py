"""What a calculator may see of a structure besides elements, positions, cell and periodicity: here, its state.

That is the arrays ``initial_charges``, ``initial_magmoms``, ``tags`` and ``masses`` of ASE, and named keys of
``atoms.info`` such as the total charge. Labels depend on it, so it travels from the start structures to all structures
that come from them. An array without information (charges, moments or tags of zero, the usual masses) counts as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses

from ubmd.data.constraints import take_fixed
from ubmd.data.extxyz import info_from_file
from ubmd.data.labels import dataset_hash
from ubmd.errors import DataError

# Initial charges and moments are often those of an earlier calculation, rounded.
_SAME_CHARGE = 0.05  # e, of the whole structure
_SAME_MOMENT = 0.1  # μ_B

_NAMES = {
    "initial_charges": "initial charges",
    "initial_magmoms": "initial magnetic moments",
    "tags": "tags",
    "masses": "masses",
}


def state_arrays(atoms: Atoms) -> dict[str, np.ndarray]:
    """Per-atom arrays [n] (moments may be [n, 3]) that are not trivial: charges in e, moments in μ_B, masses in amu."""
    found = {name: np.asarray(atoms.arrays[name]) for name in _NAMES if name in atoms.arrays}
    return {name: array for name, array in found.items() if not _is_default(name, array, atoms.numbers)}


def _is_default(name: str, array: np.ndarray, numbers: np.ndarray) -> bool:
    return np.array_equal(array, atomic_masses[numbers]) if name == "masses" else not array.any()


def state_info(atoms: Atoms, names: Iterable[str]) -> dict[str, Any]:
    """Those of the named keys that ``atoms.info`` has."""
    return {name: atoms.info[name] for name in names if name in atoms.info}


def bare(atoms: Atoms, info: Iterable[str] = ()) -> Atoms:
    """A copy with elements, positions, cell, periodicity, state and a note of fixed atoms alone.

    It has no labels, no constraints and no other ``info``.
    """
    copy = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    take_state(copy, atoms, info)
    return copy


def take_state(atoms: Atoms, source: Atoms, info: Iterable[str]) -> None:
    """Give a structure the state of another one with the same atoms in the same order, and its note of fixed atoms."""
    take_fixed(atoms, source)
    for name, array in state_arrays(source).items():
        atoms.set_array(name, array.copy())
    atoms.info |= state_info(source, info)


def state_hash(atoms: Atoms, info: Iterable[str]) -> str:
    """Hash of a state; empty for a structure that has none."""
    arrays = state_arrays(atoms)
    keys = {name: _plain(value) for name, value in sorted(state_info(atoms, info).items())}
    if not (arrays or keys):
        return ""
    content = hashlib.sha256(json.dumps(keys, sort_keys=True, default=str).encode())
    for name, array in sorted(arrays.items()):
        content.update(name.encode() + np.ascontiguousarray(array, dtype="<f8").tobytes())
    return content.hexdigest()


def structures_hash(structures: Sequence[Atoms], info: Iterable[str]) -> str:
    """`dataset_hash`, which also depends on the states if any structure has one."""
    names = list(info)
    states = [state_hash(atoms, names) for atoms in structures]
    plain = dataset_hash(structures)
    return hashlib.sha256(" ".join([plain, *states]).encode()).hexdigest() if any(states) else plain


def describe_state(atoms: Atoms, info: Iterable[str]) -> str:
    """A state in words, e.g. 'charge = 1, initial magnetic moments'; empty if there is none."""
    keys = [f"{name} = {value}" for name, value in state_info(atoms, info).items()]
    return ", ".join([*keys, *(_NAMES[name] for name in state_arrays(atoms))])


def check_state(atoms: Atoms, info: Iterable[str] = ()) -> None:
    """DataError (without file name and frame number) if a state is invalid, or files cannot keep its ``info``."""
    for key, value in state_info(atoms, info).items():
        if isinstance(value, float | np.floating) and not np.isfinite(value):
            raise DataError(f"info['{key}'] is {value}, which is not a finite number.")
        if _plain(info_from_file(key, value)) != _plain(value):
            raise DataError(
                f"info['{key}'] = {value!r} would be another value in an extxyz file; give a number, a text or a list."
            )
    for name, array in state_arrays(atoms).items():
        if not np.isfinite(array).all():
            raise DataError(f"NaN or infinity in the {_NAMES[name]}.")
        if name == "masses" and not (array > 0.0).all():
            bad = int(np.argmin(array > 0.0))
            raise DataError(f"the mass of atom {bad} (from 0) is {array[bad]:g} amu; it must be above zero.")


def electrons_differ(first: Atoms, second: Atoms, info: Iterable[str]) -> str:
    """How two structures of one composition differ in charge, spin or moments, in words; empty if they don't.

    The order of the atoms does not count: moments are compared element by element.
    """
    names = list(info)
    for name in names:
        one, other = (_plain(atoms.info.get(name)) for atoms in (first, second))
        if one != other and not (name == "charge" and not one and not other):  # no charge is a charge of 0
            return f"{name} = {_told(one)} and {_told(other)}"
    totals = [float(atoms.get_initial_charges().sum()) for atoms in (first, second)]
    if abs(totals[0] - totals[1]) > _SAME_CHARGE:
        return f"a sum of initial charges of {totals[0]:g} and {totals[1]:g} e"
    if not np.allclose(_moments(first), _moments(second), rtol=0.0, atol=_SAME_MOMENT):
        return "different initial magnetic moments"
    return ""


def mixed_states(structures: Sequence[Atoms], info: Iterable[str]) -> Iterator[tuple[int, int, str]]:
    """(first structure of a composition, another one, how `electrons_differ`): a model cannot tell these apart."""
    names, first = list(info), dict[str, int]()
    for number, atoms in enumerate(structures):
        other = first.setdefault(atoms.symbols.formula.format("hill"), number)
        if difference := electrons_differ(structures[other], atoms, names):
            yield other, number, difference


def _told(value: Any) -> str:
    return "not given" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _moments(atoms: Atoms) -> np.ndarray:
    """Atomic number and moment [n, 4], sorted."""
    moments = np.asarray(atoms.get_initial_magnetic_moments(), dtype=float).reshape(len(atoms), -1)
    padded = np.zeros((len(atoms), 3))
    padded[:, 3 - moments.shape[1] :] = moments  # a collinear moment is one along z
    rows = np.column_stack([atoms.numbers, padded])
    return rows[np.lexsort(rows.T[::-1])]


def _plain(value: Any) -> Any:
    """A value of ``info`` as JSON; 2, 2.0 and numpy's 2 are one number."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):  # extxyz gives back an array of one number as that number
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return float(value) if isinstance(value, int | float) else value
