"""What a reader should know about the labels of a file: where they are from, and what may be a mistake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ase import Atoms
from ase.units import GPa

from ubmd.data.label_keys import FREE_ENERGY, is_virial
from ubmd.data.labels import LABELS, Frame, advice, named_labels
from ubmd.errors import DataError
from ubmd.settings.labels import Source

_NOTICEABLE = 1e-4  # eV/atom between free energy and energy
_STRANGE_STRESS = 100 * GPa  # eV/Å^3
_TYPICAL_STRESS = 2.0  # GPa, of solids with displaced atoms
_STRESS_UNITS = {"GPa": 1.0, "kbar": 0.1, "MPa": 1e-3, "bar": 1e-4}


def taken(frames: Sequence[Frame], names: Mapping[str, str]) -> str:
    """From which keys, in which units, the labels of a file were taken.

    Such as "energy from REF_energy (eV), forces from REF_forces (eV/Å), stress from REF_virials (eV) in 3 of 9 frames".

    Args:
        frames: all frames of the file.
        names: what keys mean in the file's format, where it has none itself.
    """
    parts = []
    for label in LABELS:
        found = [frame.sources[label] for frame in frames if label in frame.sources]
        counts = Counter((names.get(item.key, item.key), item.unit) for item in found)
        texts = [f"{key} ({unit})" for key, unit in counts]
        if len(counts) == 1 and len(found) == len(frames):
            parts.append(f"{label} from {texts[0]}")
        elif counts:
            shares = [f"{text} in {number}" for text, number in zip(texts, counts.values(), strict=True)]
            parts.append(f"{label} from {' and '.join(shares)} of {len(frames)} frames")
    return ", ".join(parts) or "no labels"


def isolated_atoms(frames: Sequence[Frame]) -> str:
    """A sentence about frames of isolated atoms, which are no structures to learn from: their energies, to be pasted.

    Raises:
        DataError: two frames give different energies of one element.
    """
    energies: dict[str, tuple[float, int]] = {}
    for frame in frames:
        element, found = str(frame.atoms.symbols[0]), frame.sources.get("energy")
        if found is None:
            continue
        known, first = energies.setdefault(element, (found.value, frame.number))
        if abs(known - found.value) > _NOTICEABLE:
            raise DataError(
                f"the isolated atom {element} has the energy {known:.8g} eV in frame {first}, but {found.value:.8g} eV "
                f"in frame {frame.number}; remove one of them."
            )
    many = f"{len(frames)} frames with config_type=IsolatedAtom are" if len(frames) > 1 else "One isolated atom is"
    if not energies:
        return f"{many} set aside: a single atom is no structure to learn from."
    table = ", ".join(f"{element} = {energy:.10g}" for element, (energy, _) in sorted(energies.items()))
    return (
        f"{many} set aside; for a network that breaks bonds into atoms with these energies (eV), write "
        f"atom_energies = {{{table}}} below [model]."
    )


def label_remarks(frames: Sequence[Frame], mapping: Mapping[str, Source], names: Mapping[str, str]) -> Iterator[str]:
    """Sentences on what is not an error in the frames of a file, but may be a mistake; ``names`` as for `taken`."""
    yield from _mixed_sources(frames, mapping)
    yield from _unused_units(frames, mapping)
    for key in sorted({key for frame in frames for key in frame.unused}):
        without = [frame.unused[key] for frame in frames if key in frame.unused]
        yield f"'{key}' of {len(without)} frame{'s' if len(without) > 1 else ''} is not used: {without[0]}."
    excess = np.array([frame.free_energy for frame in frames if frame.free_energy is not None])
    if len(excess) and np.abs(excess).max() > _NOTICEABLE:
        energy, free = (f"'{key}'" + (f" ({names[key]})" if key in names else "") for key in ("energy", FREE_ENERGY))
        yield (
            f"{energy} is read, which differs from {free} by up to {1000 * np.abs(excess).max():.3g} meV/atom; "
            "forces are derivatives of the free energy (smeared electrons), which `ubmd run` also learns: "
            f"{advice({'energy': FREE_ENERGY})}."
        )
    yield from _strange_stress(frames)
    yield from _no_stress([frame.atoms for frame in frames])


def _mixed_sources(frames: Sequence[Frame], mapping: Mapping[str, Source]) -> Iterator[str]:
    """Labels without a given key, beside others that come from elsewhere."""
    named = named_labels(mapping)
    for frame in frames:
        families = {label: found.family for label, found in frame.sources.items()}
        for label in families:
            other = next((name for name in named & set(families) if families[name] != families[label]), None)
            if label not in named and other is not None:
                keys = {name: found.key for name, found in frame.sources.items()}
                yield (
                    f"the {other} is read from '{keys[other]}', the {label} from '{keys[label]}'; name its key, too, "
                    "if that is another level of theory."
                )
                return


def _unused_units(frames: Sequence[Frame], mapping: Mapping[str, Source]) -> Iterator[str]:
    """A unit of a stress in a file that has virials alone, or the other way round."""
    keys = [frame.sources["stress"].key for frame in frames if "stress" in frame.sources]
    for name, other in (("stress", "virial"), ("virial", "stress")):
        if (
            name in mapping
            and mapping[name].key is None
            and keys
            and all(is_virial(key) == (other == "virial") for key in keys)
        ):
            yield (
                f"the unit {mapping[name].told} of a {name} has no effect: the stress is read from '{keys[0]}', which "
                f"is a {other}."
            )


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


def _strange_stress(frames: Sequence[Frame]) -> Iterator[str]:
    """A stress larger than any crystal sustains is in another unit: which, follows from its size."""
    found = [frame.sources["stress"] for frame in frames if "stress" in frame.sources]
    sizes = [float(np.abs(item.value).max()) for item in found]
    if not sizes or max(sizes) <= _STRANGE_STRESS:
        return
    typical = max(float(np.median(sizes)), 1e-300) / _TYPICAL_STRESS
    unit = min(_STRESS_UNITS, key=lambda name: abs(np.log(typical * _STRESS_UNITS[name])))
    yield (
        f"stresses of up to {max(sizes):.3g} eV/Å^3 = {max(sizes) / GPa:.3g} GPa are read; judging by their size "
        f"they are in another unit, perhaps {unit}, or virials in eV: then say so, with --label "
        f"stress={found[0].key}:{unit} (:-{unit} if positive values are compression), or --label virial=KEY."
    )
