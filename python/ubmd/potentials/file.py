"""Model files: written by torch.jit.save, and checked against their record when they are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ubmd.devices import CPU, torch_device
from ubmd.errors import ModelError
from ubmd.files import replacing
from ubmd.operators import available
from ubmd.potentials.record import RECORD, check_said, fixed_precision, no_model_file, read_record


class Described(Protocol):
    """A module with a description of itself."""

    description: str

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """See `torch.nn.Module`."""


def write_model(deployed: Described, path: Path, extra: Mapping[str, bytes] | None = None) -> None:
    """Script the module and write it atomically (temporary file, fsync, rename).

    Its ``description`` is also kept beside its code, see `ubmd.potentials.record`; ``extra``: name -> further content.
    """
    for parameter in deployed.parameters():
        parameter.requires_grad_(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, and our file format
        scripted = torch.jit.script(deployed)
    with replacing(path) as file:
        torch.jit.save(scripted, file, _extra_files={RECORD: deployed.description.encode(), **(extra or {})})


PRECISIONS = ("mixed", "single", "double")


def load_model(path: Path, precision: str = "double") -> Any:
    """The module of a model file; see `load_with_record`."""
    return load_with_record(path, precision)[0]


def load_with_record(path: Path, precision: str = "double", device: str = CPU) -> tuple[Any, dict[str, Any]]:
    """Load a model file, which runs its code, in a precision: mixed and single run the network in float32.

    ``device``: of torch, where the module is to run; it has to be there (`ubmd.devices.check_device`).

    Returns:
        (module, record). The record is that which the file has beside its code, if it has one.

    Raises:
        ModelError: missing or corrupt file, newer format, unknown precision or one that the module cannot run in,
            operators that can't be loaded, a module whose description differs from the record, or force constants on
            another device than the CPU.
    """
    path = Path(path)
    if precision not in PRECISIONS:
        raise ModelError(f"Precision must be mixed, single or double, not {precision!r} (--precision, md.precision).")
    record = read_record(path)
    operators = available()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=torch_device(device))
        said = module.metadata()
    except (RuntimeError, AttributeError, ValueError) as error:
        if not operators and "ubmd::" in str(error):
            raise ModelError(
                f"{path} needs ubmd's compiled operators, which can't be loaded here: reinstall ubmd, or export "
                "the file with 'ubmd export --no-operators'."
            ) from None
        raise no_model_file(path) from None
    record = check_said(record, said, path)
    if device != CPU and "lattice" in record:
        raise ModelError(f"{path} holds force constants, which run on the CPU only: leave the device {device!r} out.")
    fixed = fixed_precision(record)
    if fixed is not None and precision != fixed:
        raise ModelError(f"{path} runs in {fixed} precision only, not in {precision}: leave the precision out.")
    _prepare(module, None if fixed else precision)
    return module, record


def _prepare(module: Any, precision: str | None) -> None:
    """Nothing is to be trained, and parameters have this precision (None: that which they have)."""
    dtype = torch.float64 if precision == "double" else torch.float32
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        if precision is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
