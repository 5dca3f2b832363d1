"""From settings to an ASE calculator: a ready-made reference, or any calculator by its import path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.abc import GetPropertiesMixin

from ubmd.errors import SettingsError, UbmdError, describe
from ubmd.faults import check_machine, in_worker
from ubmd.files import named_file
from ubmd.imports import import_attribute, not_installed
from ubmd.references.arguments import check_arguments
from ubmd.settings import ReferenceSettings

READY_MADE = {
    "openmm": "ubmd.references.openmm:OpenMM",
    "lammps": "ubmd.references.lammps:LAMMPS",
    "tblite": "ubmd.references.tblite:tblite",
    "sevennet": "ubmd.references.sevennet:sevennet",
    "chgnet": "ubmd.references.chgnet:chgnet",
    "cp2k": "ubmd.references.cp2k:cp2k",
    "espresso": "ubmd.references.espresso:espresso",
    "pickled": "ubmd.references.pickled:pickled",  # one that was given from Python
    "quickff_mil53": "ubmd.references.quickff:quickff_mil53",  # of lammps_examples/mil53, by the name it once had
}
"""Short names of the references that ship with the package."""


def make_calculator(settings: ReferenceSettings, base: Path) -> GetPropertiesMixin:
    """A new ASE calculator.

    Args:
        settings: ``calculator`` is one of `READY_MADE` or an import path 'package.module:Class' of anything that
            returns an ASE calculator, also in a module beside the settings file; ``arguments`` are its keyword
            arguments. A text argument that names an existing file under ``base`` becomes its full path.
            ``environment`` is set while the calculator is made.
        base: folder of the settings file.

    Raises:
        MachineError: the machine ran out of something meanwhile.
        SettingsError: the calculator cannot be imported or refuses its arguments, or one of these is misspelt.
    """
    base = Path(base).resolve()
    with variables(settings.environment):
        factory = import_attribute(settings.calculator, base, READY_MADE)
        calculator = _make(factory, settings, base)
    if isinstance(calculator, Atoms) or not hasattr(calculator, "get_forces"):
        raise SettingsError(
            f"reference.calculator = {settings.calculator!r} makes an object of type {type(calculator).__name__}, "
            "which is not an ASE calculator."
        )
    return calculator


def unrecognised_arguments(settings: ReferenceSettings, base: Path) -> list[str]:
    """Names of ``settings.arguments`` that the calculator is given but does not name; errors as `make_calculator`."""
    base = Path(base).resolve()
    with variables(settings.environment):
        return _check(import_attribute(settings.calculator, base, READY_MADE), settings, base)


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
    _check(factory, settings, base)
    if _wants_base(factory, settings):
        # These look for their files themselves: also for folders, and for names inside commands.
        arguments = settings.arguments | {"base": base}
    else:
        arguments = _resolve(settings.arguments, base)
    try:
        calculator: GetPropertiesMixin = factory(**arguments)
    except UbmdError:
        raise
    except ModuleNotFoundError as error:
        raise not_installed(settings.calculator, _module_of(settings), base, error) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not in_worker():
            raise
        check_machine(error)
        # Whatever a foreign constructor raises, its arguments come from the settings file: say which table to correct.
        raise SettingsError(
            f"reference.arguments don't suit the calculator {settings.calculator!r}: {describe(error)}"
        ) from error
    return calculator


def _check(factory: Any, settings: ReferenceSettings, base: Path) -> list[str]:
    """Names of arguments that the factory does not name; SettingsError if one is misspelt."""
    if not callable(factory):
        kind = type(factory).__name__
        raise SettingsError(
            f"reference.calculator = {settings.calculator!r} is an object of type {kind}; name a class or a function "
            "that makes an ASE calculator."
        )
    ours = ("base",) if _wants_base(factory, settings) else ()
    try:
        return check_arguments(factory, settings.calculator, settings.arguments, ours)
    except ModuleNotFoundError as error:
        raise not_installed(settings.calculator, _module_of(settings), base, error) from error


def _wants_base(factory: Any, settings: ReferenceSettings) -> bool:
    return settings.calculator in READY_MADE and "base" in signature(factory).parameters


def _module_of(settings: ReferenceSettings) -> str:
    return READY_MADE.get(settings.calculator, settings.calculator).partition(":")[0]


def _resolve(value: Any, base: Path) -> Any:
    """Copy of (nested) arguments in which texts that name files under ``base`` are full paths."""
    if isinstance(value, dict):
        return {key: _resolve(item, base) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(item, base) for item in value]
    path = named_file(base, value) if isinstance(value, str) else None
    return value if path is None else str(path.resolve())
