"""Loader of the compiled operators ``torch.ops.ubmd.*`` (``libubmd_ops.so``; ``cpp/ops`` says what they compute).

The LAMMPS plugin links the same file, so that a process which has both has one copy of the operators.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ubmd.errors import ModelError

LIBRARY_FILE = "libubmd_ops.so"


def library_file() -> Path:
    """Path of libubmd_ops.so, which lies beside the extension module ubmd._cpp (also in editable installs)."""
    spec = find_spec("ubmd._cpp")
    folder = Path(__file__) if spec is None or spec.origin is None else Path(spec.origin)
    return folder.resolve().parent / LIBRARY_FILE


@cache
def load() -> None:
    """Register the operators with torch; calling it again does nothing. Raises ModelError if they can't be."""
    import torch

    try:
        torch.ops.load_library(str(library_file()))
    except OSError as error:
        raise ModelError(
            f"the compiled operators {library_file()} can't be loaded ({error}): reinstall ubmd, or export the model "
            "without operators"
        ) from error


def available() -> bool:
    """Whether the operators can be used here (they are loaded then)."""
    try:
        load()
    except ModelError:
        return False
    return True
