"""Names under which labels are known by themselves, in any case of letters.

Each name may stand alone, or behind ``REF_`` (MACE) or ``dft_`` (GAP). Labels with one prefix are a family: they
belong together.

Whose they are, and their signs where published:

- ASE, and ubmd itself: ``energy``, ``forces``, ``stress`` (eV/Å^3, tension positive).
- NequIP and Allegro: ``total_energy``, ``forces``, ``stress`` (the same sign), ``virial`` = -V stress:
  https://nequip.readthedocs.io/en/latest/guide/reference/conventions.html
- GPUMD: ``energy``, ``force`` or ``forces``, ``virial`` (9 numbers, eV, positive where compressed), ``stress`` (eV/Å^3,
  positive where stretched), and letters of any case: https://gpumd.org/nep/input_files/train_test_xyz.html
- GAP: ``dft_energy``, ``dft_force``, ``dft_virial`` = -V stress: https://github.com/libAtoms/QUIP/issues/227
- MACE: ``REF_energy``, ``REF_forces``, ``REF_stress``, ``REF_virials``, signs as those of ASE and GAP:
  https://github.com/ACEsuit/mace-jax/pull/12

VASP and CP2K print stresses that are positive under compression; ASE reads those of VASP with its own sign. A stress of
another sign or unit has to be named: ``stress = ":-kbar"``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

FAMILIES = ("", "ref_", "dft_")
"""prefixes in small letters, the preferred one first"""
VIRIALS = ("virial", "virials")
NAMES = {
    "energy": ("energy", "total_energy", "totenergy"),
    "forces": ("forces", "force"),
    "stress": ("stress",),
    "virial": VIRIALS,
}
"""what a label is called, the preferred name first; a virial counts as a stress"""
FREE_ENERGY = "free_energy"
"""read only where a family has no energy"""

_PREFIXES = ("", "REF_")
PLAIN = {label: tuple(prefix + label for prefix in _PREFIXES) for label in ("energy", "forces", "stress")}
"""names in files of run folders"""
EXACT = {prefix + name for prefix in _PREFIXES for name in ("energy", FREE_ENERGY, "forces", "stress", *VIRIALS)}
"""names that mean labels whatever is under them"""

Places = Sequence[Mapping[str, Any]]
"""where a frame may have labels: results of its calculator, arrays, info"""


def value_of(places: Places, key: str) -> Any:
    """What is under a key, None if there is nothing."""
    return next((place[key] for place in places if place.get(key) is not None), None)


def keys_of(places: Places, family: str, name: str, n_atoms: int) -> Iterator[str]:
    """Keys of a frame that are a name with the prefix of a family, the usual case of letters first.

    Unusual spellings count only if they hold as many numbers as the label has: 'force' may be the largest force.
    """
    wanted = family + name
    found = {key for place in places for key in place if isinstance(key, str) and key.lower() == wanted}
    for key in sorted(found, key=lambda key: (key not in EXACT, key)):
        value = value_of(places, key)
        if value is not None and (key in EXACT or _fits(name, value, n_atoms)):
            yield key


def known_keys(places: Places, n_atoms: int) -> set[str]:
    """All keys of a frame that labels are known by."""
    names = (FREE_ENERGY, *(name for several in NAMES.values() for name in several))
    return EXACT | {key for family in FAMILIES for name in names for key in keys_of(places, family, name, n_atoms)}


def family_of(key: str, label: str) -> str:
    """What stands before the label in a key, in small letters: ref_ of REF_energy; of E, without a label, itself."""
    names = (*NAMES[label], *(VIRIALS if label == "stress" else ()), *((FREE_ENERGY,) if label == "energy" else ()))
    small = key.lower()
    return next((small.removesuffix(n) for n in sorted(names, key=len, reverse=True) if small.endswith(n)), small)


def is_virial(key: str) -> bool:
    """Whether a key says that it holds a virial."""
    return key.lower().endswith(VIRIALS)


def _fits(name: str, value: Any, n_atoms: int) -> bool:
    """Whether a value has as many numbers as the label of this name."""
    if isinstance(value, str | bytes | dict):
        return False
    size = np.size(value)
    if name in NAMES["forces"]:
        return bool(size == 3 * n_atoms)
    return size in (6, 9) if name in (*NAMES["stress"], *VIRIALS) else size == 1
