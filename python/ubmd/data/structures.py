"""Structures from files, with labels or without: anything that ASE reads, and what dpdata adds, checked.

Labels (energy in eV, forces in eV/Å, stress in eV/Å^3, tension positive) always sit in a ``SinglePointCalculator``.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.io.formats import UnknownFileTypeError, filetype

from ubmd.data.extxyz import scan_frames
from ubmd.data.formats import is_cp2k, read_cp2k, read_folder
from ubmd.data.geometry import check_apart
from ubmd.data.label_remarks import isolated_atoms, label_remarks, taken
from ubmd.data.labels import LABELS, Frame, check_structure, sources_of, take_labels
from ubmd.errors import DataError
from ubmd.settings.labels import Source

_FULL = 1e-3  # by which the occupancy of a site may differ from 1
_VASP = {"energy": "energy(sigma->0)", "free_energy": "free energy TOTEN"}
_MEANINGS = {"vasp-out": _VASP, "vasp-xml": _VASP}
"""what keys of ASE are in a format"""


@dataclass(frozen=True)
class Contents:
    """What a file of structures holds."""

    structures: list[Atoms]
    """with labels, where there are any, in a ``SinglePointCalculator``"""
    numbers: list[int]
    """of the structures in the file, from 0: isolated atoms that were set aside are missing"""
    taken: str
    """from which keys, in which units, the labels were taken"""


def read_structures(
    path: Path | str,
    mapping: Mapping[str, str] | None = None,
    *,
    labelled: bool = False,
    missing_ok: bool = False,
    compare: bool = True,
    remark: Callable[[str], None] = lambda _: None,
) -> list[Atoms]:
    """The structures of `read_contents`, with the same arguments and errors."""
    return read_contents(
        path, mapping, labelled=labelled, missing_ok=missing_ok, compare=compare, remark=remark
    ).structures


def read_contents(
    path: Path | str,
    mapping: Mapping[str, str] | None = None,
    *,
    labelled: bool = False,
    missing_ok: bool = False,
    partial: bool = False,
    compare: bool = True,
    remark: Callable[[str], None] = lambda _: None,
) -> Contents:
    """Read and check all frames of an extxyz file, of any file that ASE knows, or of what `ubmd.data.formats` reads.

    Labels are ``energy``, ``forces``, ``stress`` (or ``virial``), or other names that they are known by
    (`ubmd.data.label_keys`); what holds where a frame has several is the rule of `ubmd.data.labels`. ``mapping`` names
    another source for a label, or another unit, e.g. ``{"energy": "dft_energy:Ha"}`` (`ubmd.settings.labels`); a label
    whose key it names is read from there and nowhere else.

    Single atoms with ``config_type=IsolatedAtom`` (MACE's training files) are set aside; a remark gives their energies.

    Args:
        path: the file, or a folder of deepmd/npy.
        mapping: label (energy, forces, stress, virial) -> KEY, KEY:UNIT or :UNIT.
        labelled: every frame must carry energy and forces (training, evaluation).
        missing_ok: a key that the mapping names may be missing.
        partial: frames may differ in the labels that they have, down to none; a key that the mapping names must be in
            one of them.
        compare: with labels under other keys; not needed for files of a run folder, nor where nobody uses labels: there
            the first of energy and REF_energy (forces, stress) that is there counts.
        remark: called with sentences on what is not an error but may be a mistake.

    Raises:
        DataError: names the file, the frame (counted from 0) and what is wrong with it.
    """
    path = Path(path)
    sources = sources_of(mapping)

    def tell(sentence: str) -> None:
        remark(f"{path}: {sentence}")

    frames: list[Frame] = []
    isolated: list[Frame] = []
    for number, atoms in enumerate(_read_frames(path, tell)):
        aside = compare and _is_isolated(atoms)
        try:
            optional = missing_ok or aside or partial
            frame = take_labels(atoms, sources, compare=compare, missing_ok=optional, number=number)
            check_structure(frame.atoms)
            if labelled and not aside:
                check_apart(frame.atoms)
        except DataError as error:
            raise DataError(f"{path}, frame {number}: {error}") from None
        (isolated if aside else frames).append(frame)
    if not frames:
        what = "nothing but isolated atoms (config_type=IsolatedAtom)" if isolated else "no structures"
        raise DataError(f"{path} holds {what}.")
    if partial:
        _check_named_keys(path, frames, sources)
        _suggest_keys(frames, tell)
    _check_same_labels(path, frames, labelled, partial)
    names = _meanings(path)
    _tell(path, frames, isolated, sources, names, tell)
    return Contents([frame.atoms for frame in frames], [frame.number for frame in frames], taken(frames, names))


def _tell(
    path: Path,
    frames: Sequence[Frame],
    isolated: Sequence[Frame],
    sources: Mapping[str, Source],
    names: Mapping[str, str],
    tell: Callable[[str], None],
) -> None:
    """All remarks on the frames of a file."""
    if isolated:
        try:
            tell(isolated_atoms(isolated))
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    for sentence in label_remarks(frames, sources, names):
        tell(sentence)


def _is_isolated(atoms: Atoms) -> bool:
    """Whether a frame is a single atom that gives an element's energy: config_type=IsolatedAtom, or isolated_atom."""
    kind = str(atoms.info.get("config_type", "")).lower().replace("_", "")
    return len(atoms) == 1 and kind == "isolatedatom"


def _is_extxyz(path: Path) -> bool:
    return path.suffix.lower() in (".xyz", ".extxyz")


def _meanings(path: Path) -> Mapping[str, str]:
    """What keys of ASE are in the format of a file."""
    if path.is_dir() or _is_extxyz(path):
        return {}
    try:
        return _MEANINGS.get(filetype(str(path)), {})
    except Exception:  # of a format that another reader knows
        return {}


def _read_frames(path: Path, tell: Callable[[str], None]) -> Iterable[Atoms]:
    """Frames of a file as ASE reads them, one by one, with DataError instead of ASE's exceptions."""
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}.")
    if not _is_extxyz(path):
        return _read_other(path, tell)
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


def _read_other(path: Path, tell: Callable[[str], None]) -> list[Atoms]:
    """Frames of a file that is not extended XYZ."""
    if is_cp2k(path):  # first: by its name, ASE may take it for the log file of another program
        return read_cp2k(path, tell)
    try:
        structures = list(ase.io.iread(path, index=":"))
    except UnknownFileTypeError:
        raise DataError(f"ASE cannot read {path}: its format is not known; give structures as extxyz.") from None
    except Exception as error:  # ASE's readers raise anything from KeyError to AssertionError
        raise DataError(f"ASE cannot read {path}: {_sentence(error)}") from error
    for number, atoms in enumerate(structures):
        _check_occupancies(path, number, atoms)
    return structures


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


# A lattice of nine numbers, and columns: not an item of the same name with another meaning, such as lattice=fcc.
_NUMBERS = rb"[-+.\deE]+"
_FOREIGN = re.compile(
    rb"(?i)(?<!\S)(lattice(?=\s*=\s*\"\s*"
    + _NUMBERS
    + rb"(?:\s+"
    + _NUMBERS
    + rb"){8}\s*\")|properties(?=\s*=\s*species:))"
)
_USUAL = {b"lattice": b"Lattice", b"properties": b"Properties"}


def _parse(path: Path, number: int, text: bytes) -> Atoms:
    try:
        decoded = _usual_header(text).decode("utf-8-sig")
        return next(ase.io.iread(io.StringIO(decoded), index=0, format="extxyz"))
    except Exception as error:  # ASE's parser raises ValueError, KeyError, XYZError, AssertionError ...
        raise DataError(f"{path}, frame {number}: not valid extended XYZ: {_sentence(error)}") from error


def _usual_header(text: bytes) -> bytes:
    """A frame whose header says Lattice and Properties.

    GPUMD reads these words in any case of letters; to ASE, a structure with 'lattice' is a molecule with such a text.
    """
    count, header, atoms = (*text.split(b"\n", 2), b"", b"")[:3]
    if (b"Lattice=" in header and b"Properties=" in header) or not atoms:
        return text
    for match in _FOREIGN.finditer(header):
        usual = _USUAL[match[1].lower()]
        if not re.search(rb"(?<![^\s])" + usual + rb"\s*=", header):
            header = header[: match.start(1)] + usual + header[match.end(1) :]
    return b"\n".join([count, header, atoms])


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith(".") else f"{text}."


def _check_named_keys(path: Path, frames: Sequence[Frame], sources: Mapping[str, Source]) -> None:
    """DataError if no frame has a key that the mapping names."""
    for name, source in sources.items():
        label = "stress" if name == "virial" else name
        if source.key is not None and not any(label in frame.sources for frame in frames):
            try:
                take_labels(frames[0].atoms, {name: source}, number=frames[0].number)
            except DataError as error:
                raise DataError(f"{path}, frame {frames[0].number}: {error}") from None


def _suggest_keys(frames: Sequence[Frame], tell: Callable[[str], None]) -> None:
    """A remark on keys that may hold a label that no frame has."""
    for label in ("energy", "forces"):
        perhaps = _perhaps(label, frames[0].atoms)
        if perhaps and not any(label in frame.sources for frame in frames):
            tell(f"no {label} found under the usual keys{perhaps}; name its key with --label {label}=KEY.")


def _check_same_labels(path: Path, frames: Sequence[Frame], labelled: bool, partial: bool) -> None:
    """Energy and forces belong to all frames or to none (unless ``partial``), and come from one key throughout."""
    for label in LABELS:
        have = [frame for frame in frames if label in frame.sources]
        lack = [frame for frame in frames if label not in frame.sources]
        if label != "stress" and lack and (have or labelled) and not partial:
            raise DataError(
                f"{path}, frame {lack[0].number}: no {label} ({len(lack)} of {len(frames)} frames lack it); label "
                f"these frames, remove them, or name the key that holds the {label}{_perhaps(label, lack[0].atoms)}: "
                f'--label {label}=KEY, in settings labels = {{{label} = "KEY"}}.'
            )
        names = {frame.sources[label].key: frame.number for frame in reversed(have)}
        families = {frame.sources[label].family for frame in have}
        if len(families if label == "stress" else names) > 1:
            _raise_two_keys(path, label, have)


def _raise_two_keys(path: Path, label: str, frames: Sequence[Frame]) -> None:
    """DataError: a label is under two keys in the frames of one file."""
    first = frames[0]
    second = next(f for f in frames if f.sources[label].key != first.sources[label].key)
    raise DataError(
        f"{path}, frame {second.number}: the {label} is under '{second.sources[label].key}', but under "
        f"'{first.sources[label].key}' in frame {first.number}; use one key in the whole file."
    )


def _perhaps(label: str, atoms: Atoms) -> str:
    """Keys of a frame that may hold a label, as ', perhaps ...'."""
    n = 3 * len(atoms) if label == "forces" else 1
    items = (atoms.arrays if label == "forces" else atoms.info).items()
    found = [f"'{key}'" for key, value in items if label.removesuffix("s") in key.lower() and np.size(value) == n]
    return f", perhaps {' or '.join(found)}" if found else ""
