"""Files of structures: written without losing a digit or a frame, repaired if they were cut short.

They are extended XYZ that ``ase.io.read`` understands. ASE's own writer keeps 8 decimals only, so this module writes
the frames itself.
"""

from __future__ import annotations

import codecs
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict
from ase.stress import voigt_6_to_full_3x3_stress

from ubmd.data.constraints import held_atoms
from ubmd.data.labels import LABELS, check_structure, labels_of
from ubmd.errors import DataError
from ubmd.files import append_text, replacing, sync_folder

_RESERVED = {"Lattice", "Properties", "pbc", *LABELS}
_COLUMN_NAMES = {"positions": "pos", "numbers": "Z"}


def repair_structures(path: Path | str) -> int:
    """Cut an unfinished last frame, left by a crash during ``append_structures``, off an extxyz file.

    Only the beginning of one frame is ever removed; complete frames are never touched.

    Returns:
        The number of bytes cut off: 0 for an intact file, and for one that does not exist.

    Raises:
        DataError: the file is damaged elsewhere than at its end, so that cutting would lose finished frames.
    """
    path = Path(path)
    if not path.exists():
        return 0
    content = path.read_bytes()
    frames, complete = scan_frames(path, content, strict_end=True)
    del frames
    if complete == len(content):
        return 0
    with path.open("r+b") as file:
        file.truncate(complete)
        os.fsync(file.fileno())
    return len(content) - complete


def scan_frames(path: Path, content: bytes, strict_end: bool) -> tuple[list[tuple[int, int]], int]:
    """Byte ranges of the complete frames, and where the last of them ends.

    ASE's reader silently stops at a blank line; here everything after the last complete frame must be the
    beginning of one more frame (or blank).

    Args:
        strict_end: count a frame whose last line has no line break as incomplete, since its last number may be
            cut; foreign files without the final line break are accepted otherwise.

    Raises:
        DataError: bytes that are neither a frame nor the beginning of the last one.
    """
    lines = content.splitlines(keepends=True)
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines], dtype=np.int64)]).tolist()
    frames: list[tuple[int, int]] = []
    line = 0
    while line < len(lines):
        if not lines[line].strip(b"\0 \t\r\n"):  # blank, or the zeros that a power failure leaves behind
            rest = content[offsets[line] :]
            if not rest.strip(b"\0 \t\r\n"):
                return frames, offsets[line] if rest.strip() else len(content)
        is_last_line = line + 1 == len(lines) and not lines[line].endswith(b"\n")
        count = (lines[line].removeprefix(codecs.BOM_UTF8) if line == 0 else lines[line]).strip()
        if not count.isdigit() or int(count) == 0:
            raise DataError(f"{path}: line {line + 1} should be the number of atoms of frame {len(frames)}.")
        end = line + 2 + int(count)
        while end < len(lines) and lines[end].lstrip().startswith(b"VEC"):
            end += 1
        cut = end > len(lines) or (strict_end and not lines[end - 1].endswith(b"\n"))
        if is_last_line or cut:
            return frames, offsets[line]
        frames.append((offsets[line], offsets[end]))
        line = end
    return frames, len(content)


def write_structures(path: Path | str, structures: Iterable[Atoms]) -> None:
    """Write an extxyz file that replaces an old one only once it is complete on disk.

    Numbers have 17 significant digits, so that reading returns the same bits; the stress is written as 9 numbers.
    ``atoms.info`` and ``atoms.arrays`` are kept, of the calculator's results only energy, forces and stress. Of
    constraints only FixAtoms is, in the column ``move_mask`` that ASE reads and writes.

    Raises:
        DataError: something that the format cannot hold, or labels that do not belong to the structure.
    """
    path = Path(path)
    text = as_extxyz(structures)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())
    sync_folder(path.parent)


def append_structures(path: Path | str, structures: Iterable[Atoms]) -> None:
    """Append frames to an extxyz file (made if missing); they are on disk when this returns.

    A frame that a crash cut off at the end of the file is removed first, so that it cannot swallow the new ones.

    Raises:
        DataError: as in `write_structures` and `repair_structures`.
    """
    path = Path(path)
    text = as_extxyz(structures)
    path.parent.mkdir(parents=True, exist_ok=True)
    repair_structures(path)
    append_text(path, text)


def as_extxyz(structures: Iterable[Atoms]) -> str:
    """Structures as the text that `write_structures` writes; DataError as there."""
    return "".join(_frame(atoms) for atoms in structures)


def _frame(atoms: Atoms) -> str:
    """One frame as extended XYZ text that ends with a line break."""
    check_structure(atoms)
    labels = labels_of(atoms)
    columns = {"positions": atoms.positions, **_extra_columns(atoms)}
    if "forces" in labels:
        columns["forces"] = labels["forces"]
    if any(isinstance(constraint, FixAtoms) for constraint in atoms.constraints):
        columns["move_mask"] = ~np.isin(np.arange(len(atoms)), held_atoms(atoms))
    properties, texts = ["species:S:1"], [np.array(atoms.get_chemical_symbols())[:, None]]
    for name, array in columns.items():
        kind, text = _column(name, array, len(atoms))
        properties.append(f"{_COLUMN_NAMES.get(name, name)}:{kind}:{text.shape[1]}")
        texts.append(text)
    rows = "\n".join(" ".join(row) for row in np.concatenate(texts, axis=1))
    return f"{len(atoms)}\n{_header(atoms, labels, ':'.join(properties))}\n{rows}\n"


def _extra_columns(atoms: Atoms) -> dict[str, np.ndarray]:
    """Per-atom arrays beside numbers and positions."""
    extra = {name: array for name, array in atoms.arrays.items() if name not in ("numbers", "positions")}
    if "forces" in extra:
        raise DataError("atoms.arrays has 'forces'; put them into a SinglePointCalculator, or rename the array.")
    return extra


def _column(name: str, array: np.ndarray, n_atoms: int) -> tuple[str, np.ndarray]:
    """Type letter and text [n, columns] of a per-atom array."""
    if array.ndim > 2 or any(character in name for character in ': ="'):
        raise DataError(f"the per-atom array '{name}' of shape {array.shape} does not fit into extxyz; remove it.")
    flat = array.reshape(n_atoms, -1)
    formats: dict[str, tuple[str, Any]] = {
        "f": ("R", lambda value: f"{value:24.16e}"),
        "i": ("I", lambda value: f"{value:d}"),
        "u": ("I", lambda value: f"{value:d}"),
        "b": ("L", lambda value: "T" if value else "F"),
    }
    letter, form = formats.get(array.dtype.kind, ("S", str))
    text = np.array([[form(value) for value in row] for row in flat.tolist()])
    if letter == "S" and any(not word or len(word.split()) != 1 for word in text.flat):
        raise DataError(f"the per-atom array '{name}' holds empty words or spaces, which extxyz cannot keep.")
    return letter, text


def _header(atoms: Atoms, labels: Mapping[str, Any], properties: str) -> str:
    """The second line of a frame: lattice, properties, labels, info."""
    clash = [key for key in atoms.info if key in _RESERVED]
    if clash:
        raise DataError(f"atoms.info has the reserved key '{clash[0]}'; labels belong in a SinglePointCalculator.")
    parts = []
    if atoms.cell.any():
        parts.append(f'Lattice="{" ".join(repr(float(x)) for x in np.asarray(atoms.cell).ravel())}"')
    parts.append(f"Properties={properties}")
    if "energy" in labels:
        parts.append(f"energy={float(labels['energy'])!r}")
    if "stress" in labels:
        full = voigt_6_to_full_3x3_stress(labels["stress"])
        parts.append(f'stress="{" ".join(repr(float(x)) for x in full.ravel())}"')
    parts.extend(_info_item(key, value) for key, value in atoms.info.items())
    parts.append(f'pbc="{" ".join("FT"[int(p)] for p in atoms.pbc)}"')
    line = " ".join(parts)
    if "\n" in line or "\r" in line:
        raise DataError("atoms.info holds text with a line break, which extxyz cannot keep.")
    return line


def info_from_file(key: str, value: Any) -> Any:
    """What a value of ``atoms.info`` is after `write_structures` and reading.

    Raises:
        DataError: the format cannot hold it.
    """
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # of ASE, which leaves such a value out
        item = _info_item(key, value)
    if "\n" in item or "\r" in item:
        raise DataError(f"info['{key}'] holds a line break, which extxyz cannot keep.")
    return key_val_str_to_dict(item).get(key)


def _info_item(key: str, value: Any) -> str:
    """``key=value`` that ASE reads back as the same value.

    ASE turns the text "12" into a number, None into True, and drops backslashes: such values go in as JSON.
    """
    if not isinstance(key, str) or not key or any(character in key for character in "= \"'\\{}[]\n"):
        raise DataError(f"atoms.info has the key {key!r}, which extxyz cannot keep; use a plain word.")
    if value is not None and not isinstance(value, str):
        value = _without_arrays(value) if isinstance(value, dict | list | tuple) else value
        return str(key_val_dict_to_str({key: value}))
    plain = str(key_val_dict_to_str({key: value}))
    back = key_val_str_to_dict(plain) if value else {}
    if list(back) == [key] and isinstance(back[key], str) and back[key] == value:
        return plain
    quoted = "null" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    escaped = quoted.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="_JSON {escaped}"'


def _without_arrays(value: Any) -> Any:
    """A nested value with lists in place of arrays and of numpy's numbers, as JSON needs it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _without_arrays(item) for name, item in value.items()}
    return [_without_arrays(item) for item in value] if isinstance(value, list | tuple) else value
