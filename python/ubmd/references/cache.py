"""Labels that are never computed twice: a folder of labelled structures, by a hash of all that determines a label.

Runs may share the folder, also at the same time: a label is one file, written under another name and then renamed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.data.extxyz import write_structures
from ubmd.data.labels import labels_of
from ubmd.data.state import bare, state_hash
from ubmd.data.structures import read_structures
from ubmd.errors import DataError, SettingsError
from ubmd.settings import ReferenceSettings

Results = dict[str, Any]
"""energy (eV), forces [n, 3] (eV/Å) and perhaps stress [6] (eV/Å^3)"""

# In the file of a label with an atom without force: that is the reference's own zero. Labels of earlier versions had
# zeros on atoms that a constraint held.
_UNCONSTRAINED = "unconstrained"


def through_cache(atoms: Atoms, settings: ReferenceSettings, base: Path, compute: Callable[[], Results]) -> Results:
    """The kept label of this structure with this reference, else that of ``compute``, which is then kept.

    Args:
        atoms: the structure.
        settings: ``cache`` is the folder, relative to ``base``; without it nothing is kept.
        base: folder of the settings file.
        compute: makes the label; what it raises is not kept.
    """
    if settings.cache is None:
        return compute()
    key = label_hash(atoms, settings, base)
    path = Path(base) / Path(settings.cache).expanduser() / key[:2] / f"{key}.extxyz"
    if path.exists():
        try:
            kept = read_structures(path, labelled=True)[0]
            if kept.info.get(_UNCONSTRAINED) or not _has_zero_force(labels_of(kept)):
                return labels_of(kept)
        except DataError:
            pass  # a damaged file, for instance after a power failure: made again
    results = compute()
    copy = bare(atoms, settings.info)
    copy.calc = SinglePointCalculator(copy, **results)
    if _has_zero_force(results):
        copy.info[_UNCONSTRAINED] = True
    try:
        write_structures(path, [copy])
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise SettingsError(f"reference.cache: {error.strerror}: {path.parent.parent}; name another folder.") from None
    return results


def _has_zero_force(results: Results) -> bool:
    return bool((np.asarray(results["forces"]) == 0.0).all(axis=-1).any())


def label_hash(atoms: Atoms, settings: ReferenceSettings, base: Path) -> str:
    """Hash of the structure, the reference and the files it names.

    Of the structure every bit counts, the order of its atoms, and charges, moments, tags, masses and ``reference.info``
    if it has them.

    What only belongs to the machine (time-out, number of processes and threads), and limits and noise, which are
    applied to the kept label, don't count.
    """
    arguments = {key: value for key, value in settings.arguments.items() if key not in ("launcher", "threads")}
    text = json.dumps([settings.calculator, arguments], sort_keys=True, default=str)  # TOML has dates, too
    content = hashlib.sha256(text.encode())
    for word in sorted(set(_words(arguments))):
        if (Path(base) / word).is_file():
            content.update((Path(base) / word).read_bytes())
    state = state_hash(atoms, settings.info)
    words = [structure_hash(atoms), *([state] if state else []), content.hexdigest()]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def structure_hash(atoms: Atoms) -> str:
    """Hash of elements, positions, cell and periodicity, to the last bit."""
    content = hashlib.sha256()
    for array in (atoms.numbers, atoms.pbc, atoms.cell[:], atoms.positions):
        content.update(np.ascontiguousarray(array, dtype=float).tobytes())
    return content.hexdigest()


def _words(value: Any) -> Iterator[str]:
    """All words of the texts in nested arguments."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str):
        yield from value.split()
