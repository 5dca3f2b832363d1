"""From settings to an ASE calculator: a ready-made reference, or any calculator by its import path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from ase.calculators.abc import GetPropertiesMixin

from ubmd.errors import SettingsError, UbmdError
from ubmd.settings import ReferenceSettings

READY_MADE = {
    "openmm": "ubmd.references.openmm:OpenMM",
    "lammps": "ubmd.references.lammps:LAMMPS",
    "quickff_mil53": "ubmd.references.quickff:quickff_mil53",
    "tblite": "ubmd.references.tblite:tblite",
    "cp2k": "ubmd.references.cp2k:cp2k",
    "espresso": "ubmd.references.espresso:espresso",
}
"""Short names of the references that ship with the package."""

_PIP_NAMES = {"openmm": "'ubmd[openmm]'", "tblite": "'ubmd[tblite]'"}


def make_calculator(settings: ReferenceSettings, base: Path) -> GetPropertiesMixin:
    """A new ASE calculator.

    Args:
        settings: ``calculator`` is one of `READY_MADE` or an import path 'package.module:Class' of anything that
            returns an ASE calculator, also in a module beside the settings file; ``arguments`` are its keyword
            arguments. A text argument that names an existing file under ``base`` becomes its full path.
            ``environment`` is set while the calculator is made.
        base: folder of the settings file.

    Raises:
        SettingsError: the calculator cannot be imported or refuses its arguments.
    """
    base = Path(base).resolve()
    with variables(settings.environment):
        return _make(_import(settings.calculator, base), settings, base)


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that hold inside the ``with`` block (of this process and the programs it starts)."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _make(factory: Any, settings: ReferenceSettings, base: Path) -> GetPropertiesMixin:
    if settings.calculator in READY_MADE and "base" in signature(factory).parameters:
        # These look for their files themselves: also for folders, and for names inside commands.
        arguments = settings.arguments | {"base": base}
    else:
        arguments = _resolve(settings.arguments, base)
    try:
        return factory(**arguments)
    except UbmdError:
        raise
    except ImportError as error:
        raise _not_installed(settings.calculator, error) from error
    except Exception as error:
        # Whatever a foreign constructor raises, its arguments come from the settings file: say which table to mend.
        message = f"reference.arguments don't suit the calculator {settings.calculator!r}: {error}"
        raise SettingsError(message) from error


def _import(name: str, base: Path) -> Any:
    """The class or function behind a short name or an import path; modules in the settings file's folder count, too."""
    path = READY_MADE.get(name, name)
    module_name, separator, attribute = path.partition(":")
    if not separator:
        names = ", ".join(sorted(READY_MADE))
        raise SettingsError(
            f"reference.calculator = {name!r} is neither a ready-made reference ({names}) "
            "nor an import path like 'ase.calculators.emt:EMT'."
        )
    top = module_name.partition(".")[0]
    if ((base / f"{top}.py").is_file() or (base / top / "__init__.py").is_file()) and str(base) not in sys.path:
        sys.path.append(str(base))  # at the end: a file of the user must not hide an installed package
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise _not_installed(name, error) from error
    if not hasattr(module, attribute):
        raise SettingsError(f"reference.calculator: the module {module_name} has no {attribute!r}; check its spelling.")
    return getattr(module, attribute)


def _not_installed(calculator: str, error: ImportError) -> SettingsError:
    package = (error.name or READY_MADE.get(calculator, calculator)).partition(".")[0].partition(":")[0]
    return SettingsError(
        f"reference.calculator = {calculator!r} cannot be imported ({error}); "
        f"install it with: pip install {_PIP_NAMES.get(package, package)}"
    )


def _resolve(value: Any, base: Path) -> Any:
    """Copy of (nested) arguments in which texts that name files under ``base`` are full paths."""
    if isinstance(value, dict):
        return {key: _resolve(item, base) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(item, base) for item in value]
    if isinstance(value, str) and value and (base / value).is_file():
        return str((base / value).resolve())
    return value
