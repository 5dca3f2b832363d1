"""Labels that the user already has: a run begins with them, once a few of them have been labelled again.

Labels of another level of theory, in other units, or with another zero of energy would spoil every model that is
trained on them together with new ones, without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers

from ubmd.data.duplicates import ALIKE, close_pairs
from ubmd.data.geometry import check_geometry
from ubmd.data.labels import labels_of
from ubmd.data.state import bare
from ubmd.data.structures import read_contents
from ubmd.errors import DataError, LabelError, SettingsError
from ubmd.references import check_force
from ubmd.settings import ReferenceSettings, RunSettings

CHECKED = 3
"""labels of one composition that are made again"""
FORCE_TOLERANCE = 0.005  # eV/Å
ENERGY_TOLERANCE = 0.001  # eV/atom
_STRESS_TOLERANCE = 0.1 * units.GPa
_STRESS_SHARE = 0.2  # of the largest stress; programs differ in their Pulay stress
_SAME = 1e-6  # Å; as closely as files of few digits repeat a structure
_NAMED = 5  # frames that a sentence lists

_FORCE_UNITS = {
    "Ha/Bohr": units.Ha / units.Bohr,
    "Ry/Bohr": units.Ry / units.Bohr,
    "kcal/mol/Å": units.kcal / units.mol,
    "kJ/mol/Å": units.kJ / units.mol,
    "meV/Å": 1e-3,
}


@dataclass(frozen=True)
class Agreement:
    """How labels of the same structures from two sources differ."""

    force: float
    """largest difference of a force component, eV/Å"""
    energy: float
    """largest difference of the energies after the best constant per element, eV/atom"""
    constants: dict[str, float]
    """element -> what has to be added to the given energies, eV per atom of it"""
    constant: float
    """largest contribution of these to the energy of a structure, eV/atom"""


def read_given(
    settings: RunSettings,
    base: Path,
    remark: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Atoms]:
    """The labelled structures of ``start.labels``, their energies shifted as the settings say; empty without that key.

    Args:
        settings: of the run.
        base: folder of the settings file.
        remark: called with sentences on what may be a mistake.
        tell: called with the sentence that says where the labels were taken from.

    Returns:
        Structures with nothing but their state, their labels, and in ``info`` their number in the file as ``replica``.

    Raises:
        SettingsError: there is no such file, or start.energy_shifts names an element that it lacks.
        DataError: a frame cannot be used.
    """
    start = settings.start
    if start.labels is None:
        return []
    path = base / start.labels
    if not path.exists():
        raise SettingsError(f"start.labels: there is no file {path} (the path is relative to the settings file).")
    contents = read_contents(path, settings.labels, labelled=True, remark=remark)
    tell(f"{start.labels}: {contents.taken}.")
    present = {symbol for atoms in contents.structures for symbol in atoms.symbols}
    for element in start.energy_shifts:
        if element not in present:
            raise SettingsError(f"start.energy_shifts names {element}, which {start.labels} does not have; remove it.")
    return [_taken(atoms, n, settings) for atoms, n in zip(contents.structures, contents.numbers, strict=True)]


def _taken(atoms: Atoms, number: int, settings: RunSettings) -> Atoms:
    """A labelled structure as `read_given` returns it, the energy shifted."""
    copy, labels = bare(atoms, settings.reference.info), labels_of(atoms)
    copy.info["replica"] = number
    labels["energy"] += sum(settings.start.energy_shifts.get(symbol, 0.0) for symbol in atoms.symbols)
    copy.calc = SinglePointCalculator(copy, **labels)
    return copy


# ------------------------------------------------------------------------------------------- what looks wrong


def set_aside(given: Sequence[Atoms], reference: ReferenceSettings) -> tuple[list[Atoms], list[Atoms]]:
    """(labels within the limits of the reference, the others without calculator and with the reason in ``info``)."""
    usable, refused = [], []
    for atoms in given:
        try:
            check_geometry(atoms, reference.min_distance)
            check_force(atoms.get_forces(), reference.force_limit)
            usable.append(atoms)
        except LabelError as error:
            copy = atoms.copy()
            copy.info["reason"] = str(error)
            refused.append(copy)
    return usable, refused


def given_remarks(given: Sequence[Atoms], refused: Sequence[Atoms], file: Path) -> Iterator[str]:
    """Sentences on labels that are there twice, nearly twice, or beyond the limits of the reference (``refused``)."""
    if refused:
        yield (
            f"{file}: {len(refused)} of {len(given)} labels are beyond the limits for new ones and are left out "
            f"(they go to rejected.extxyz); the first: {refused[0].info['reason']}"
        )
    yield from _repeated(given, str(file))


def _repeated(given: Sequence[Atoms], file: str) -> Iterator[str]:
    """Sentences on structures that are there more than once, or nearly so."""
    number = [atoms.info.get("replica", k) for k, atoms in enumerate(given)]
    same: list[tuple[int, int]] = []
    near: list[tuple[int, int]] = []
    for i, j, distance in close_pairs(given):
        (same if distance < _SAME else near).append((number[i], number[j]))
        first, second = labels_of(given[i])["forces"], labels_of(given[j])["forces"]
        if distance < _SAME and not np.allclose(first, second, atol=FORCE_TOLERANCE):
            yield f"{file}: frames {number[i]} and {number[j]} are one structure with different forces: one is wrong."
    if same:
        yield f"{file}: {_told(len({j for _, j in same}), 'is', 'are')} there more than once ({_frames(same)})."
    if near:
        yield (
            f"{file}: {_told(len({j for _, j in near}), 'differs', 'differ')} from an earlier one by less than "
            f"{ALIKE:g} Å ({_frames(near)}): these teach little, and validation errors on them look too good."
        )


def _told(count: int, one: str, many: str) -> str:
    return f"one frame {one}" if count == 1 else f"{count} frames {many}"


def _frames(pairs: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{i} and {j}" for i, j in pairs[:_NAMED])
    return f"{shown}, …" if len(pairs) > _NAMED else shown


# ----------------------------------------------------------------------------------------- labelled again


def to_check(given: Sequence[Atoms]) -> list[int]:
    """Numbers of the labels that are made again: a few of the most frequent composition, one of each further one.

    Further compositions only as far as they tell constants of elements apart.
    """
    counts = element_counts(given)
    rows = [row.tobytes() for row in counts]
    common = Counter(rows).most_common(1)[0][0]  # of equally frequent ones the first
    same = [k for k, row in enumerate(rows) if row == common]
    chosen = sorted({same[round(k)] for k in np.linspace(0, len(same) - 1, CHECKED)})
    for k in (rows.index(row) for row in dict.fromkeys(rows)):
        if np.linalg.matrix_rank(counts[[*chosen, k]]) > np.linalg.matrix_rank(counts[chosen]):
            chosen.append(k)
    return chosen


def element_counts(structures: Sequence[Atoms]) -> np.ndarray:
    """Atoms of each element in each structure, [structures, elements], elements by atomic number."""
    numbers = elements_of(structures)
    return np.array([[np.count_nonzero(atoms.symbols == symbol) for symbol in numbers] for atoms in structures])


def elements_of(structures: Sequence[Atoms]) -> list[str]:
    """All elements, by atomic number."""
    return sorted({symbol for atoms in structures for symbol in atoms.symbols}, key=atomic_numbers.__getitem__)


def agreement_remark(found: Agreement, count: int, settings: RunSettings) -> str:
    """What the comparison has found, as a sentence."""
    name = Path(settings.start.labels or "").name
    again = "one label" if count == 1 else f"{count} labels"
    return (
        f"{name}: the reference agrees with {again} that it has made again: forces to "
        f"{1000 * found.force:.2g} meV/Å, energies to {1000 * max(found.energy, found.constant):.2g} meV/atom."
    )


def compare(given: Sequence[Atoms], again: Sequence[Atoms]) -> Agreement:
    """How given labels differ from those that the reference has made for the same structures.

    Constants of elements are those of the smallest norm where the structures do not determine them.
    """
    force = max(float(np.abs(a.get_forces() - b.get_forces()).max()) for a, b in zip(given, again, strict=True))
    counts, atoms = element_counts(given), np.array([len(structure) for structure in given])
    difference = np.array(
        [b.get_potential_energy() - a.get_potential_energy() for a, b in zip(given, again, strict=True)]
    )
    constants, *_ = np.linalg.lstsq(counts.astype(float), difference, rcond=None)
    energy = float(np.abs((difference - counts @ constants) / atoms).max())
    constant = float(np.abs(counts @ constants / atoms).max())
    return Agreement(force, energy, dict(zip(elements_of(given), constants.tolist(), strict=True)), constant)


def check_agreement(given: Sequence[Atoms], again: Sequence[Atoms], file: str) -> Agreement:
    """`compare`, and DataError if the labels cannot be used together; ``file`` is what the sentence calls the first.

    Raises:
        DataError: forces, relative energies, or stresses differ, or energies have another zero.
    """
    found = compare(given, again)
    end = "start.trust = true begins with them all the same."
    if found.force > FORCE_TOLERANCE:
        raise DataError(
            f"{file}: the reference's own forces for {len(given)} of its structures differ by up to {found.force:.3g} "
            f"eV/Å from those in the file{_force_hint(given, again)}: these labels are not this reference's; {end}"
        )
    _check_stress(given, again, file, end)
    if found.energy > ENERGY_TOLERANCE:
        raise DataError(
            f"{file}: the reference's own energies for {len(given)} of its structures differ by up to "
            f"{1000 * found.energy:.3g} meV/atom from those in the file, apart from a constant per element, although "
            f"the forces agree: perhaps they are not the free energies that belong to the forces; {end}"
        )
    if found.constant > ENERGY_TOLERANCE:
        table = ", ".join(f"{element} = {value:.6g}" for element, value in found.constants.items())
        raise DataError(
            f"{file}: its energies have another zero than the reference's, by {found.constant:.6g} eV/atom; forces "
            f"agree. Add a constant per element (eV): start.energy_shifts = {{{table}}}."
        )
    return found


def _force_hint(given: Sequence[Atoms], again: Sequence[Atoms]) -> str:
    """A factor that makes the forces equal, if there is one, and the unit that it belongs to."""
    old, new = (np.concatenate([atoms.get_forces().ravel() for atoms in some]) for some in (given, again))
    factor = float(old @ new / max(old @ old, 1e-300))
    if np.abs(factor * old - new).max() > 0.05 * np.abs(new).max():
        return ""
    if abs(factor + 1.0) < 0.05:
        return " (they have the opposite sign)"
    unit = next((name for name, value in _FORCE_UNITS.items() if abs(factor / value - 1.0) < 0.02), None)
    return f" (a factor of {factor:.4g}{f': perhaps they are in {unit}' if unit else ''})"


def _check_stress(given: Sequence[Atoms], again: Sequence[Atoms], file: str, end: str) -> None:
    """DataError if a stress differs by more than programs do; one that the reference lacks is not compared."""
    for old, new in zip(given, again, strict=True):
        if "stress" not in labels_of(old) or "stress" not in labels_of(new):
            continue
        first, second = labels_of(old)["stress"], labels_of(new)["stress"]
        difference = float(np.abs(first - second).max())
        if difference > _STRESS_TOLERANCE + _STRESS_SHARE * float(np.abs(second).max()):
            sign = np.abs(first + second).max() < 0.1 * np.abs(second).max()
            hint = " (the sign is the opposite: ubmd's stress is positive under tension)" if sign else ""
            raise DataError(
                f"{file}: the reference's own stress differs by up to {difference / units.GPa:.3g} GPa from that in "
                f"the file, although the forces agree{hint}; {end}"
            )
