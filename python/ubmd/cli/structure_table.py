"""Labelled structures in files: read and check them, write them without losing a digit or a frame.

Labels (energy in eV, forces in eV/Å, stress in eV/Å^3, tension positive) always sit in a
``SinglePointCalculator``. Files are extended XYZ that ``ase.io.read`` understands; anything else that ASE
reads is accepted as input. ASE's own writer keeps 8 decimals only, so this module writes the frames itself.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io.extxyz import key_val_dict_to_str, key_val_str_to_dict
from ase.io.formats import UnknownFileTypeError
from ase.stress import voigt_6_to_full_3x3_stress
from ase.units import GPa
from rich.table import Table

from ubmd.data.geometry import check_apart, check_cell
from ubmd.data.labels import LABELS, Frame, check_mapping, label_remarks, shaped, take_labels
from ubmd.errors import DataError
from ubmd.files import replacing

EV_PER_A3_IN_MPA = 1000 / GPa
_FULL = 1e-3  # by which the occupancy of a site may differ from 1
_RESERVED = {"Lattice", "Properties", "pbc", *LABELS}
_COLUMN_NAMES = {"positions": "pos", "numbers": "Z"}


# ---------------------------------------------------------------------------------------------- reading


def read_structures(
    path: Path | str,
    mapping: Mapping[str, str] | None = None,
    *,
    labelled: bool = False,
    missing_ok: bool = False,
    compare: bool = True,
    remark: Callable[[str], None] = lambda _: None,
) -> list[Atoms]:
    """Read all frames of an extxyz file, or of any file that ASE knows, and check them.

    Labels are ``energy``, ``forces``, ``stress`` (or ``virial``), else ``REF_energy``, ``REF_forces``, ``REF_stress``
    (or ``REF_virial``); what holds where a frame has several is the rule of `ubmd.data.labels`. ``mapping`` names
    another source for a label, e.g. ``{"energy": "dft_energy"}``; a label that it names is read from there and nowhere
    else.

    Args:
        path: the file.
        mapping: label (energy, forces, stress, virial) -> key of ``atoms.info`` or ``atoms.arrays``.
        labelled: every frame must carry energy and forces (training, evaluation).
        missing_ok: a key that the mapping names may be missing.
        compare: with labels under other keys; not needed for files of a run folder, nor where nobody uses labels: there
            the first of energy and REF_energy (forces, stress) that is there counts.
        remark: called with sentences on what is no error but may be a mistake.

    Returns:
        Structures whose labels, where there are any, sit in a ``SinglePointCalculator``.

    Raises:
        DataError: names the file, the frame (counted from 0) and what is wrong with it.
    """
    path = Path(path)
    mapping = dict(mapping or {})
    check_mapping(mapping)
    frames = []
    for number, atoms in enumerate(_read_frames(path)):
        try:
            frame = take_labels(atoms, mapping, compare=compare, missing_ok=missing_ok)
            check_structure(frame.atoms)
            if labelled:
                check_apart(frame.atoms)
        except DataError as error:
            raise DataError(f"{path}, frame {number}: {error}") from None
        frames.append(frame)
    if not frames:
        raise DataError(f"{path} holds no structures.")
    _check_same_labels(path, frames, labelled)
    for sentence in label_remarks(frames, mapping):
        remark(f"{path}: {sentence}")
    return [frame.atoms for frame in frames]


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
    frames, complete = _scan(path, content, strict_end=True)
    del frames
    if complete == len(content):
        return 0
    with path.open("r+b") as file:
        file.truncate(complete)
        os.fsync(file.fileno())
    return len(content) - complete


def _read_frames(path: Path) -> Iterable[Atoms]:
    """Frames of a file as ASE reads them, one by one, with DataError instead of ASE's exceptions."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.suffix.lower() not in (".xyz", ".extxyz"):
        try:
            structures = list(ase.io.iread(path, index=":"))
        except UnknownFileTypeError:
            raise DataError(f"ASE cannot read {path}: it is of no known kind; give structures as extxyz.") from None
        except Exception as error:  # ASE's readers raise anything from KeyError to AssertionError
            raise DataError(f"ASE cannot read {path}: {_sentence(error)}") from error
        for number, atoms in enumerate(structures):
            _check_occupancies(path, number, atoms)
        return structures
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is text in UTF-16; save it as UTF-8.")
    frames, complete = _scan(path, content, strict_end=False)
    if content[complete:].strip():
        raise DataError(
            f"{path}: the last frame (number {len(frames)}) is not complete; `ubmd run` cuts it off by itself, "
            "for other files remove it or write the file again."
        )
    return [_parse(path, number, content[start:end]) for number, (start, end) in enumerate(frames)]


def _check_occupancies(path: Path, number: int, atoms: Atoms) -> None:
    """DataError if a site of a CIF file holds several elements or is not always filled: ASE puts one atom there."""
    sites = atoms.info.get("occupancy")
    for shares in sites.values() if isinstance(sites, dict) else ():
        if len(shares) != 1 or abs(sum(shares.values()) - 1.0) > _FULL:
            told = " and ".join(f"{element} {share:g}" for element, share in shares.items())
            raise DataError(
                f"{path}, frame {number}: a site is occupied by {told}, of which ASE makes one whole atom; give a "
                "supercell with whole atoms instead."
            )


def _parse(path: Path, number: int, text: bytes) -> Atoms:
    try:
        return next(ase.io.iread(io.StringIO(text.decode("utf-8-sig")), index=0, format="extxyz"))
    except Exception as error:  # ASE's parser raises ValueError, KeyError, XYZError, AssertionError ...
        raise DataError(f"{path}, frame {number}: not valid extended XYZ: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _scan(path: Path, content: bytes, strict_end: bool) -> tuple[list[tuple[int, int]], int]:
    """Byte ranges of the complete frames, and where the last of them ends.

    ASE's reader stops at a blank line without a word; here everything after the last complete frame must be the
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
    if "stress" in labels and not atoms.pbc.all():
        raise DataError("a stress needs a cell that is periodic in all three directions; remove the stress.")


def fixed_atoms(atoms: Atoms) -> np.ndarray:
    """Indices of the atoms that ASE's FixAtoms holds, sorted, from 0 (-1 is the last atom).

    Raises:
        DataError: a constraint of another kind, which is not supported, or one on atoms that are not there.
    """
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms):
            raise DataError(
                f"the structure has a constraint {type(constraint).__name__}, but only FixAtoms is supported: remove "
                "it with atoms.set_constraint()."
            )
    return _held(atoms)


def check_free(atoms: Atoms) -> None:
    """DataError if no atom can move: constraints other than FixAtoms, or FixAtoms on every atom."""
    if len(fixed_atoms(atoms)) == len(atoms):
        raise DataError("all atoms are fixed (FixAtoms), so that nothing would move: leave some of them free.")


def _held(atoms: Atoms) -> np.ndarray:
    """Indices of the atoms that FixAtoms holds, whatever other constraints there are."""
    held = [np.asarray(c.index, dtype=np.int64) for c in atoms.constraints if isinstance(c, FixAtoms)]
    indices = np.concatenate([np.empty(0, dtype=np.int64), *held])
    out = indices[(indices < -len(atoms)) | (indices >= len(atoms))]
    if len(out):
        raise DataError(f"FixAtoms holds atom {out[0]}, but there are only {len(atoms)} atoms (counted from 0).")
    return np.unique(indices % max(1, len(atoms)))


def _check_same_labels(path: Path, frames: Sequence[Frame], labelled: bool) -> None:
    """Energy and forces belong to all frames or to none, and come from one key throughout."""
    sources = [frame.sources for frame in frames]
    for label in LABELS:
        have = [number for number, source in enumerate(sources) if label in source]
        lack = [number for number, source in enumerate(sources) if label not in source]
        if label != "stress" and lack and (have or labelled):
            raise DataError(
                f"{path}, frame {lack[0]}: no {label} ({len(lack)} of {len(sources)} frames lack it); label these "
                f"frames, remove them, or name the key that holds the {label}{_perhaps(label, frames[lack[0]].atoms)}: "
                f'--label {label}=KEY, in settings labels = {{{label} = "KEY"}}.'
            )
        names = {sources[number][label]: number for number in reversed(have)}
        if len({name.startswith("REF_") for name in names} if label == "stress" else names) > 1:
            first, second = sorted(names, key=lambda name: names[name])[:2]
            raise DataError(
                f"{path}, frame {names[second]}: the {label} is under '{second}', but under '{first}' in frame "
                f"{names[first]}; use one key in the whole file."
            )


def _perhaps(label: str, atoms: Atoms) -> str:
    """Keys of a frame that may hold a label, as ', perhaps ...'."""
    n = 3 * len(atoms) if label == "forces" else 1
    items = (atoms.arrays if label == "forces" else atoms.info).items()
    found = [f"'{key}'" for key, value in items if label.removesuffix("s") in key.lower() and np.size(value) == n]
    return f", perhaps {' or '.join(found)}" if found else ""


# -------------------------------------------------------------------------------------------- labels


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
    """Raise DataError unless there are structures, each sound and with energy and forces.

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


# -------------------------------------------------------------------------------------------- writing


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
    _sync_folder(path.parent)


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
    is_new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync_folder(path.parent)


def as_extxyz(structures: Iterable[Atoms]) -> str:
    """Structures as the text that `write_structures` writes; DataError as there."""
    return "".join(_frame(atoms) for atoms in structures)


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power failure, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _frame(atoms: Atoms) -> str:
    """One frame as extended XYZ text that ends with a line break."""
    check_structure(atoms)
    labels = labels_of(atoms)
    columns = {"positions": atoms.positions, **_extra_columns(atoms)}
    if "forces" in labels:
        columns["forces"] = labels["forces"]
    if any(isinstance(constraint, FixAtoms) for constraint in atoms.constraints):
        columns["move_mask"] = ~np.isin(np.arange(len(atoms)), _held(atoms))
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
        return key_val_dict_to_str({key: _without_arrays(value) if isinstance(value, dict | list | tuple) else value})
    plain = key_val_dict_to_str({key: value})
    back = key_val_str_to_dict(plain) if value else {}
    if list(back) == [key] and isinstance(back[key], str) and back[key] == value:
        return plain
    quoted = "null" if value is None else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    escaped = quoted.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="_JSON {escaped}"'


def _without_arrays(value: Any) -> Any:
    """A nested value with lists in place of arrays and of numpy's numbers, as JSON wants it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _without_arrays(item) for name, item in value.items()}
    return [_without_arrays(item) for item in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------ summaries


def describe(structures: Sequence[Atoms], title: str | None = None) -> Table:
    """A table of what was found: counts, elements, labels and ranges with units."""
    labels = [labels_of(atoms) for atoms in structures]
    table = Table(title=title)
    for column in ("quantity", "found", "smallest", "mean", "largest", "unit"):
        table.add_column(column, justify="left" if column in ("quantity", "found", "unit") else "right")
    table.add_row("structures", str(len(structures)))
    table.add_row("elements", _element_counts(structures))
    periodic = sum(bool(atoms.pbc.any()) for atoms in structures)
    table.add_row("periodic", f"{periodic} of {len(structures)}")
    _range_row(table, "atoms", [len(atoms) for atoms in structures], len(structures), "")
    _range_row(table, "volume", [a.get_volume() for a in structures if a.cell.rank == 3], len(structures), "Å^3")
    per_atom = [found["energy"] / len(a) for a, found in zip(structures, labels, strict=True) if "energy" in found]
    _range_row(table, "energy", per_atom, len(structures), "eV/atom")
    norms = [np.linalg.norm(found["forces"], axis=1) for found in labels if "forces" in found]
    _range_row(table, "|force|", norms, len(structures), "eV/Å")
    pressure = [-found["stress"][:3].mean() * EV_PER_A3_IN_MPA for found in labels if "stress" in found]
    _range_row(table, "pressure", pressure, len(structures), "MPa")
    return table


def _element_counts(structures: Sequence[Atoms]) -> str:
    counts: Counter[str] = Counter()
    for atoms in structures:
        counts.update(atoms.get_chemical_symbols())
    order = {symbol: int(Atoms(symbol).numbers[0]) for symbol in counts}
    return ", ".join(f"{symbol} {counts[symbol]}" for symbol in sorted(counts, key=order.__getitem__))


def _range_row(table: Table, name: str, values: Sequence[Any], total: int, unit: str) -> None:
    """A row with the range of one number per structure, or of one array per structure."""
    found = f"{len(values)} of {total}" if unit else ""
    if not values:
        if name in ("energy", "|force|"):
            table.add_row(name, found)
        return
    flat = np.concatenate([np.atleast_1d(np.asarray(value, dtype=float)) for value in values])
    table.add_row(name, found, *(f"{x:.6g}" for x in (flat.min(), flat.mean(), flat.max())), unit)


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
