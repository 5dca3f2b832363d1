"""The record of a model file (what it is, what it was made from), read without running the file.

A model file is a TorchScript program, and loading it runs code in it. Its record lies beside the code, as the JSON text
of the zip member ``extra/ubmd.json``. Files of earlier versions have none: theirs is the attribute ``description`` of
the pickled module.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeGuard

from ubmd import __version__
from ubmd.errors import ModelError
from ubmd.valid_json import parse_json

FORMAT = 4  # newest format of the model file; raised when an older plugin could not read a file
RECORD = "ubmd.json"  # name of the extra file

_LARGEST = 64 << 20  # bytes of a record, or of a pickled module without its tensors
_DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a model file; nothing in the file is run.

    Returns:
        None if it has no record of its own, as networks of other programs, which give it only when they are run.

    Raises:
        ModelError: there is no such file, it is not a model file, it is damaged, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"There is no model file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            text = _member(archive, f"extra/{RECORD}", path)
            pickled = None if text is not None else _member(archive, "data.pkl", path)
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError, EOFError, ValueError):
        raise no_model_file(path) from None
    if text is None and pickled is None:
        raise no_model_file(path)
    description = text if text is not None else _description(pickled or b"", path)
    return None if description is None else parse_record(description, path)


def format_of(layers: int, fixed_precision: bool, pairs: bool = False, scaled: bool = False) -> int:
    """The lowest format that says all: earlier versions read files of format 1, and refuse those of a newer one.

    Format 2 has message passing or a fixed precision; format 3 force constants with pair functions; format 4 factors of
    the atomic uncertainties by element (``scaled``).
    """
    if scaled:
        return 4
    if pairs:
        return 3
    return 2 if layers > 1 or fixed_precision else 1


def parse_record(text: str | bytes, path: Path) -> dict[str, Any]:
    """The record from its text, with what every model file must say.

    Raises:
        ModelError: it is no such record, or of a newer format.
    """
    try:
        record = parse_json(text)
    except (TypeError, ValueError, RecursionError):
        raise no_model_file(path) from None
    if not isinstance(record, dict):
        raise no_model_file(path)
    version, cutoff = record.get("format", 0), record.get("cutoff")
    if _is_number(version) and version > FORMAT:
        raise ModelError(
            f"{path} has format {version}, but ubmd {__version__} reads up to {FORMAT}; "
            "upgrade with 'pip install -U ubmd'."
        )
    elements = record.get("elements")
    if not isinstance(elements, list) or not elements or not all(isinstance(name, str) for name in elements):
        raise damaged(path, "elements is not a list of names")
    if not _is_number(cutoff) or not 0.0 < cutoff < math.inf:
        raise damaged(path, "cutoff is not a positive length")
    if not _is_number(version):
        raise damaged(path, "format is not a number")
    _check_graph(record, path)
    return record


def _check_graph(record: dict[str, Any], path: Path) -> None:
    """ModelError if the record does not say in a valid way how the module is to be run; absent keys have defaults."""
    layers, fixed = record.get("layers", 1), record.get("fixed_precision", False)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise damaged(path, "layers is not a positive integer")
    if not isinstance(fixed, bool):
        raise damaged(path, "fixed_precision is not true or false")
    if fixed and record.get("precision") not in ("float32", "float64"):
        raise damaged(path, "precision is neither float32 nor float64")
    scale = record.get("atom_scale")
    if scale is not None and not _is_scale(scale, len(record["elements"])):
        raise damaged(path, "atom_scale is not a positive number for each element")
    needed = format_of(layers, fixed, scaled=scale is not None)
    if record["format"] < needed:
        keys = "layers and fixed_precision need" if scale is None else "atom_scale needs"
        raise damaged(path, f"{keys} format {needed}")


def fixed_precision(record: dict[str, Any]) -> str | None:
    """The only precision of pair_style ubmd that the module runs in, 'mixed' or 'double'; None if any."""
    if not record.get("fixed_precision", False):
        return None
    return "double" if record["precision"] == "float64" else "mixed"


def precision_for(path: Path, preferred: str) -> str:
    """The precision to run a model file in: ``preferred``, unless it runs in another only.

    Raises:
        ModelError: see `read_record`.
    """
    record = read_record(path)
    return (fixed_precision(record) if record is not None else None) or preferred


def check_said(record: dict[str, Any] | None, said: str, path: Path) -> dict[str, Any]:
    """The record, checked against the loaded module's own description; without a record, that description.

    Raises:
        ModelError: they differ.
    """
    found = parse_record(said, path)
    if record is not None and found != record and _canonical(found) != _canonical(record):
        raise ModelError(
            f"{path} is refused: its code gives another description than its record; "
            "export the model again, or ask its author for a new copy."
        )
    return found if record is None else record


def no_model_file(path: Path) -> ModelError:
    """The error for what cannot be read."""
    return ModelError(f"{path} is not a ubmd model file (or it is damaged); make one with 'ubmd train' or 'ubmd run'.")


def damaged(path: Path, what: str) -> ModelError:
    """The error for a record that does not hold what it should."""
    return ModelError(f"The record of model file {path} is damaged ({what}): export the model again.")


@contextmanager
def complete_record(path: Path) -> Iterator[None]:
    """Where a record is used: what it lacks, or has of a wrong kind, becomes a ModelError."""
    try:
        yield
    except _DAMAGED as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise damaged(path, what) from None


def _is_scale(value: Any, count: int) -> bool:
    is_list = isinstance(value, list) and len(value) == count
    return is_list and all(_is_number(number) and 0.0 < number < math.inf for number in value)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _canonical(record: dict[str, Any]) -> str:
    """Text that is the same for equal records, also with values that aren't numbers."""
    return json.dumps(record, sort_keys=True)


# ------------------------------------------------------------------------------------------ the zip file


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes | None:
    """Content of a member below the archive's one folder; None if there is none.

    Raises:
        ModelError: two have this name (programs differ in which one they read), or it is too large.
    """
    names = archive.namelist()
    wanted = f"{names[0].partition('/')[0]}/{name}" if names else name
    found = [info for info in archive.infolist() if info.filename.lower() == wanted.lower()]
    if not found:
        return None
    if len(found) > 1:
        raise damaged(path, f"it occurs {len(found)} times")
    if found[0].file_size > _LARGEST:
        raise damaged(path, f"it has {found[0].file_size} bytes")
    return archive.read(found[0])


# ------------------------------------------------------------------------------------------ files of earlier versions


class _Object:
    """Stands for every object and every result of a function in a pickle: nothing of it is called."""

    state: Any = None

    def __new__(cls, *_: Any, **__: Any) -> _Object:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle._Unpickler):
    """Builds text, numbers and containers only.

    The unpickler in Python: the compiled one allocates memory for as many objects as a pickle claims to contain.
    """

    def find_class(self, module: str, name: str) -> type[_Object]:
        return _Object

    def persistent_load(self, pid: Any) -> None:
        """Tensors are left out."""


def _description(pickled: bytes, path: Path) -> str | None:
    """The attribute ``description`` of a pickled module, None if it has none."""
    try:
        module = _Reader(BytesIO(pickled)).load()
    except Exception:  # a pickle can be wrong in any way
        raise no_model_file(path) from None
    if not isinstance(module, _Object):  # weights, for example
        raise no_model_file(path)
    description = module.state.get("description") if isinstance(module.state, dict) else None
    return description if isinstance(description, str) else None
