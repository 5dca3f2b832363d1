"""Importing what is named as 'module:attribute': by settings, also from beside their file, or by a registry."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ubmd.errors import SettingsError, describe
from ubmd.faults import check_machine, in_worker
from ubmd.files import file_hash
from ubmd.spelling import nearest

_PIP_NAMES = {
    **{name: f"'ubmd[{name}]'" for name in ("openmm", "tblite", "chgnet")},
    "sevenn": "'ubmd[sevennet]'",
}


CALCULATOR = "reference.calculator"


def load(path: str) -> Any:
    """The object of this package that 'module:name' names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Lazy:
    """A function or class of ours that is imported when it is called."""

    path: str
    """'module:name'"""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return load(self.path)(*arguments, **options)


def import_attribute(
    name: str,
    base: Path,
    short_names: Mapping[str, str],
    key: str = CALCULATOR,
    what: str = "a ready-made reference",
    example: str = "ase.calculators.emt:EMT",
) -> Any:
    """The class or function behind an import path or one of the short names for them.

    Args:
        name: 'package.module:Class', or a short name.
        base: folder of the settings file; modules in it count, too, after the installed ones.
        short_names: short name -> import path.
        key: the setting that names it, for messages.
        what: what a short name stands for, for messages.
        example: of an import path, for messages.

    Raises:
        SettingsError: there is no such module or attribute, or the module cannot be imported.
    """
    path = short_names.get(name, name)
    module_name, separator, attribute = path.partition(":")
    if not separator:
        names = ", ".join(sorted(short_names))
        meant = nearest(name, short_names) or (":".join(name.rsplit(".", 1)) if "." in name.strip(".") else None)
        raise SettingsError(
            f"{key} = {name!r} is neither {what} ({names}) nor an import path like {example!r}"
            + (f"; did you mean {meant!r}?" if meant else ".")
        )
    _check_path(f"{key} = {name!r}", module_name, attribute, base, example)
    module = _import_module(name, module_name, base, key)
    if not hasattr(module, attribute):
        raise SettingsError(_no_attribute(module, attribute, base, key))
    return getattr(module, attribute)


def _check_path(start: str, module_name: str, attribute: str, base: Path, example: str) -> None:
    """SettingsError for what is not an import path: a file's name, or one that begins or ends with nothing."""
    if "/" in module_name or (module_name.endswith(".py") and own_file(module_name.removesuffix(".py"), base)):
        path = Path(base, module_name.removesuffix(".py"))
        if path.is_relative_to(base) and ".." not in path.parts:
            meant = f": write '{'.'.join(path.relative_to(base).parts)}:{attribute}'."
        else:
            meant = f": put it into {base} and write '{path.name}:{attribute}'."
        raise SettingsError(f"{start} names a file, but a module is needed{meant}")
    spaces = module_name != module_name.lstrip() or attribute != attribute.rstrip()
    if not (attribute and all(module_name.split("."))) or spaces:
        raise SettingsError(f"{start} is not an import path; write it like {example!r}.")


def own_file(module_name: str, base: Path) -> Path | None:
    """The file (or folder) beside the settings file that an import path may mean."""
    top = module_name.partition(".")[0]
    for path in (base / f"{top}.py", base / top):
        if top and (path.is_file() if path.suffix else path.is_dir()):
            return path
    return None


def own_files(modules: Iterable[str], base: Path) -> Iterator[tuple[str, str]]:
    """(path relative to ``base``, SHA-256) of imported modules that lie in the folder of the settings file."""
    folder = Path(base).resolve()
    for module in modules:
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None or "site-packages" in file or module.partition(".")[0] == "ubmd":
            continue
        path = Path(file).resolve()
        if path.is_relative_to(folder):
            yield str(path.relative_to(folder)), file_hash(path)


def _import_module(name: str, module_name: str, base: Path, key: str) -> ModuleType:
    if own_file(module_name, base) is not None and str(base) not in sys.path:
        sys.path.append(str(base))  # at the end: a file of the user must not hide an installed package
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        raise not_installed(name, module_name, base, error, key) from error
    except BaseException as error:  # whatever the module does when it is imported, sys.exit included
        if isinstance(error, KeyboardInterrupt) and not in_worker():
            raise
        check_machine(error)
        raise _broken(name, error, base, key) from error


def not_installed(
    name: str, module_name: str, base: Path, error: ModuleNotFoundError, key: str = CALCULATOR
) -> SettingsError:
    """The sentence about a module that is not there: the one that was asked for, or one that it needs.

    Args:
        name: what the setting says.
        module_name: the module that it stands for.
        base: folder of the settings file.
        error: names the module that is missing.
        key: the setting.
    """
    missing = error.name or ""
    top = missing.partition(".")[0]
    if missing != module_name and not module_name.startswith(f"{missing}."):
        is_package = top and (missing == top or top in _PIP_NAMES)
        own = f"there is no {top}.py in {base} either; " if _own_frames(error, base) else ""
        hint = f"; {own}install what is missing with: pip install {_PIP_NAMES.get(top, top)}" if is_package else "."
        return SettingsError(str(_broken(name, error, base, key)).rstrip(".") + hint)
    start = f"{key} = {name!r}"
    if missing != top:
        return SettingsError(
            f"{start} cannot be imported: the package {top} has no module {missing}; check its spelling."
        )
    sentence = f"{start} cannot be imported: there is no {top}.py in {base}, and no installed package of that name"
    if "." in module_name:
        return SettingsError(f"{sentence}; if it is a package, install it, for example with: pip install {top}")
    return SettingsError(f"{sentence}; check its spelling.")


def _broken(name: str, error: BaseException, base: Path, key: str) -> SettingsError:
    told = f"SyntaxError: {error.msg}" if isinstance(error, SyntaxError) else describe(error)
    return SettingsError(f"{key} = {name!r} cannot be imported: {told}{_place(error, base)}.")


def _no_attribute(module: ModuleType, attribute: str, base: Path, key: str) -> str:
    meant = nearest(attribute, [key for key in vars(module) if not key.startswith("_")])
    hint = f"did you mean {meant!r}?" if meant else "check its spelling."
    own, file = own_file(module.__name__, base), getattr(module, "__file__", None)
    if file is None and own is not None and own.is_dir():
        parts = sorted(path.stem for path in own.glob("*.py"))
        hint = f"{own} is a folder: name the module in it{f', perhaps {module.__name__}.{parts[0]}' if parts else ''}."
    elif own is not None and "." not in module.__name__ and not Path(file or "/").resolve().is_relative_to(base):
        hint = f"Python has its own module of this name ({file or 'built in'}): rename {own.name}."
    return f"{key}: the module {module.__name__} has no {attribute!r}; {hint}"


def _place(error: BaseException, base: Path) -> str:
    """Where an import failed: ' (FILE, line N)', in the user's own files if it passed through any."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}, line {error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_foreign(frame.filename)]
    chosen = _own_frames(error, base) or frames
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in chosen[-1:])


def _own_frames(error: BaseException, base: Path) -> list[traceback.FrameSummary]:
    """Where an error passed through the user's own files; an environment beside the settings does not count."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(base)]
    return [frame for frame in own if "site-packages" not in frame.filename and _is_foreign(frame.filename)]


def _is_foreign(file: str) -> bool:
    """Whether code is neither ours nor Python's machinery of imports."""
    machinery = file.startswith("<frozen") or Path(file).parent.name == "importlib"
    return not machinery and not Path(file).is_relative_to(Path(__file__).parent)
