"""A calculator that was handed over as a Python object: kept as a file, so that worker processes can make it.

cloudpickle also takes classes and functions of a script or a notebook, which plain pickle cannot find elsewhere.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
from ase.calculators.abc import GetPropertiesMixin
from ase.calculators.calculator import Calculator

from ubmd.errors import SettingsError, describe
from ubmd.files import replacing

NAME = "pickled"
"""of `pickled` in ``reference.calculator``"""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the text of an object: another one in each process


@dataclass(frozen=True)
class Packed:
    """A calculator, or a function that makes one, as bytes, and what it is in words."""

    content: bytes
    name: str
    """class or function with its module"""
    parameters: str
    """of a calculator of ASE: what it computes, in a fixed order; empty if unknown"""

    def settings(self, file: str) -> dict[str, Any]:
        """The keys of the table ``reference`` for a calculator that is kept in a file (relative to the settings)."""
        arguments = {"name": self.name, "parameters": self.parameters, "file": file}
        return {"calculator": NAME, "arguments": arguments}

    def keep(self, path: Path) -> None:
        """Write the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as handle:
            handle.write(self.content)


def pack(calculator: GetPropertiesMixin | Callable[[], GetPropertiesMixin]) -> Packed:
    """Bytes of a calculator, or of a function without arguments that makes one.

    Raises:
        SettingsError: it is neither, or it cannot be sent to another process.
    """
    is_calculator = _is_calculator(calculator)
    if not is_calculator and not callable(calculator):
        raise SettingsError(
            f"calculator is of type {type(calculator).__name__}; give an ASE calculator, or a function that makes one."
        )
    named = type(calculator) if is_calculator else calculator
    name = f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', repr(named))}"
    try:
        content = _dumps(calculator, named)
    except Exception as error:  # whatever the object's parts raise
        cure = (
            f"give a function that makes it instead, such as calculator=lambda: {type(calculator).__name__}(...)"
            if is_calculator
            else "let the function make everything that it needs itself"
        )
        raise SettingsError(
            f"The calculator {name} cannot be sent to the processes that label ({describe(error)}): {cure}."
        ) from None
    parameters = getattr(calculator, "parameters", None) if is_calculator else None
    return Packed(content, name, _text(parameters) if isinstance(parameters, dict) else "")


def _dumps(calculator: Any, named: Any) -> bytes:
    """Bytes that hold the code of an own class or function, too: other processes need not find its module.

    Where that is not possible (a module with an open file, for instance), they have to.
    """
    module = sys.modules.get(getattr(named, "__module__", ""))
    if module is not None and module.__name__ != "__main__" and not _is_installed(module):
        cloudpickle.register_pickle_by_value(module)
        try:
            with suppress(Exception):
                return bytes(cloudpickle.dumps(calculator))
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    return bytes(cloudpickle.dumps(calculator))


def _is_installed(module: ModuleType) -> bool:
    """Whether a module is Python's own, or of an installed package."""
    file = getattr(module, "__file__", None)
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return file is None or any(Path(file).is_relative_to(folder) for folder in folders if folder)


def _text(parameters: dict[str, Any]) -> str:
    items = (f"{key}={value!r}" for key, value in sorted(parameters.items()))
    return _ADDRESS.sub("", ", ".join(" ".join(item.split()) for item in items))


def pickled(name: str, parameters: str, file: str, base: Path) -> GetPropertiesMixin:
    """The calculator in a file that `Packed.keep` wrote, without results that it already had.

    Args:
        name: class or function, for people.
        parameters: what it computes, for people; with another one, a run refuses to resume.
        file: path of the file, relative to ``base``.
        base: folder of the settings.

    Raises:
        SettingsError: the file is not there, cannot be loaded, or its function raises.
    """
    path = Path(base) / file
    try:
        found = cloudpickle.loads(path.read_bytes())
        calculator: GetPropertiesMixin = found if _is_calculator(found) else found()
    except FileNotFoundError:
        raise SettingsError(f"The calculator {name} was kept in {path}, but there is no such file.") from None
    except Exception as error:
        raise SettingsError(f"The calculator {name}, kept in {path}, cannot be made: {describe(error)}.") from error
    if isinstance(calculator, Calculator):
        # ASE's calculators return their last results for a structure that differs only in tags, masses or `info`.
        calculator.reset()
    return calculator


def _is_calculator(thing: Any) -> bool:
    """Whether it is an ASE calculator itself, not a class or function that makes one."""
    return hasattr(thing, "get_forces") and not isinstance(thing, type)
