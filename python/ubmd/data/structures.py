"""Structures from files, with labels or without: anything that ASE reads, checked.

Labels (energy in eV, forces in eV/Å, stress in eV/Å^3, tension positive) always sit in a ``SinglePointCalculator``.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.io.formats import UnknownFileTypeError

from ubmd.data.extxyz import scan_frames
from ubmd.data.geometry import check_apart
from ubmd.data.labels import (
    LABELS,
    Frame,
    check_mapping,
    check_structure,
    label_remarks,
    take_labels,
)
from ubmd.errors import DataError

_FULL = 1e-3  # by which the occupancy of a site may differ from 1


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
        remark: called with sentences on what is not an error but may be a mistake.

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


def _read_frames(path: Path) -> Iterable[Atoms]:
    """Frames of a file as ASE reads them, one by one, with DataError instead of ASE's exceptions."""
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if path.suffix.lower() not in (".xyz", ".extxyz"):
        try:
            structures = list(ase.io.iread(path, index=":"))
        except UnknownFileTypeError:
            raise DataError(f"ASE cannot read {path}: its format is not known; give structures as extxyz.") from None
        except Exception as error:  # ASE's readers raise anything from KeyError to AssertionError
            raise DataError(f"ASE cannot read {path}: {_sentence(error)}") from error
        for number, atoms in enumerate(structures):
            _check_occupancies(path, number, atoms)
        return structures
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is text in UTF-16; save it as UTF-8.")
    frames, complete = scan_frames(path, content, strict_end=False)
    if content[complete:].strip():
        raise DataError(
            f"{path}: the last frame (number {len(frames)}) is not complete; `ubmd run` removes it by itself, "
            "in other files remove it or write the file again."
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
