"""Whether a calculator knows the arguments that it is given.

ASE's ``Calculator.__init__`` takes any keyword: a misspelt ``method`` would leave the method at its default, and labels
would silently be of another level of theory. Programs with hundreds of keywords (Vasp, CP2K, DFTB+) rely on
that freedom, so a name is refused only if it can be nothing but a mistake.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from ase.calculators.calculator import BaseCalculator, Calculator, FileIOCalculator
from ase.calculators.genericfileio import GenericFileIOCalculator

from ubmd.errors import SettingsError
from ubmd.spelling import nearest

_ANY = inspect.Parameter.VAR_KEYWORD
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_COMMON = (BaseCalculator, Calculator, FileIOCalculator, GenericFileIOCalculator)
"""Their arguments say how a program runs, not what it computes: Vasp's 'istart' is not a misspelt 'restart'."""

_PASSED_ON = {
    "ase.calculators.espresso:Espresso": "ase.io.espresso:write_espresso_in",
    "ubmd.references.tblite:tblite": "tblite.ase:TBLite",
}
"""Calculators that pass their keywords on to something else, which alone names them."""


def check_arguments(
    factory: Callable[..., Any], calculator: str, arguments: Iterable[str], ours: Iterable[str] = ()
) -> list[str]:
    """Names of arguments that a calculator is given but does not name.

    Args:
        factory: class or function that makes the calculator.
        calculator: what the settings call it, for messages.
        arguments: names of the keyword arguments.
        ours: names that settings must not give.

    Raises:
        SettingsError: an argument that the calculator cannot take, or one that is up to two letters away from one that
            it names (and that its source does not mention).
    """
    named, takes_any = known_arguments(factory)
    keywords = _keyword_tables(factory) if takes_any else set()
    known = (named | keywords) - set(ours)
    unknown = [name for name in arguments if name not in known]
    unknown = [name for name in unknown if not (takes_any and _is_mentioned(name, factory))]
    for name in unknown:
        meant = nearest(name, known, keywords | _common_arguments())
        if meant is not None or not takes_any:
            hint = f"did you mean {meant!r}?" if meant else f"known arguments: {', '.join(sorted(known)) or 'none'}."
            raise SettingsError(
                f"reference.arguments don't suit the calculator {calculator!r}: it has no argument {name!r}; {hint}"
            )
    return unknown


def known_arguments(factory: Callable[..., Any]) -> tuple[set[str], bool]:
    """(names that a calculator is known to take, whether it takes any other).

    Known are the parameters of its signature, where that has ``**kwargs`` what is taken out of these by name and the
    parameters of its base classes' constructors, and the ``default_parameters`` of ASE's calculators.
    """
    known, takes_any = _signature(factory)
    if isinstance(factory, partial):
        return known | known_arguments(factory.func)[0], takes_any
    goes_on = takes_any
    for kind in _kinds(factory):
        defaults = vars(kind).get("default_parameters")
        known |= set(defaults) if isinstance(defaults, Mapping) else set()
        if goes_on and "__init__" in vars(kind):
            names, goes_on = _signature(vars(kind)["__init__"])
            known |= names - {"self"}
    target = _target(factory)
    return known | (known_arguments(target)[0] - {"fd", "atoms"} if target else set()), takes_any


def _kinds(factory: Callable[..., Any]) -> list[type]:
    """A class and its base classes; none for a function."""
    return [kind for kind in inspect.getmro(factory) if kind is not object] if inspect.isclass(factory) else []


def _target(factory: Callable[..., Any]) -> Callable[..., Any] | None:
    """What a factory passes its keywords on to, where that has to be known."""
    path = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__name__', '')}"
    if path not in _PASSED_ON:
        return None
    module, _, name = _PASSED_ON[path].partition(":")
    target: Callable[..., Any] = getattr(import_module(module), name)
    return target


def _signature(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """(names that can be given by keyword, whether there is ``**kwargs``) of a function or class."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled, without a signature
        return set(), True
    others = [p.name for p in parameters if p.kind is _ANY]
    names = {p.name for p in parameters if p.kind in _BY_NAME}
    return names.union(*(_taken_from(name, function) for name in others)), bool(others)


def _taken_from(others: str, function: Callable[..., Any]) -> set[str]:
    """Names that a function takes out of its ``**others``, as in others.pop("xc") or others["xc"]."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return set()
    return set(re.findall(rf"""\b{others}(?:\.(?:pop|get|setdefault)\(|\[)\s*['"](\w+)['"]""", source))


def _keyword_tables(factory: Callable[..., Any]) -> set[str]:
    """A program's keywords, where the calculator's modules list them ('float_keys' of Vasp, 'pw_keys' of Espresso)."""
    found: set[str] = set()
    for module in _modules(factory):
        for table, values in vars(module).items():
            if table.endswith("_keys") and isinstance(values, list | tuple | Mapping):
                groups = values.values() if isinstance(values, Mapping) else [values]
                found |= {
                    word for group in groups if isinstance(group, list) for word in group if isinstance(word, str)
                }
    return found


def _common_arguments() -> set[str]:
    return set().union(*(_signature(kind)[0] for kind in _COMMON))


def _is_mentioned(name: str, factory: Callable[..., Any]) -> bool:
    """Whether the calculator's source has this name in quotes: a keyword in a table, an old name that still works."""
    quoted = re.compile(rf"""(['"]){re.escape(name)}\1""")
    for module in _modules(factory):
        try:
            if quoted.search(inspect.getsource(module)):
                return True
        except (OSError, TypeError):  # compiled, or made on the fly
            continue
    return False


def _modules(factory: Callable[..., Any]) -> list[ModuleType]:
    """Modules that a factory and its base classes come from, ASE's own base classes left out."""
    kinds: list[Any] = [kind for kind in _kinds(factory) if kind not in _COMMON] or [factory]
    names = dict.fromkeys(getattr(kind, "__module__", None) for kind in [*kinds, _target(factory)])
    left_out = ("builtins", "abc", "ase.calculators.abc")
    return [sys.modules[name] for name in names if name in sys.modules and name not in left_out]
