"""A second device of torch with real numbers, on any machine: what mixes devices on a GPU is an error here, too.

Its tensors hold a tensor of the CPU each, which all operations work on, but say that they are on another device. So
they take the branches of a GPU (`is_cpu` is False, kernels of the CPU alone are not reached), and results can be
compared. An operation on tensors of both devices is a fault, with the exceptions that CUDA makes: copies, numbers
(tensors without dimensions) and indices. ``.numpy()`` fails, as it does on a GPU.

torch can hand a device to Python: `torch.utils.backend_registration` (experimental there). New tensors can be made on
it inside `elsewhere()`, at whose end the faults are raised: an error inside a derivative would end the process.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "elsewhere"
ATEN = torch.ops.aten
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)
INDEXED = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)


class MixedDevices(RuntimeError):
    """Operations on tensors of both devices."""


_faults: list[str] = []


class Elsewhere(torch.Tensor):
    """A tensor of the device; ``held``: its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)
        made.held = held
        return made

    def tolist(self) -> Any:
        """As of any tensor; torch refuses it to subclasses."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(function, args, kwargs or {})


def _dispatched(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the held tensors; its results are of the device that they would be on."""
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, Elsewhere)]
    wanted = kwargs.get("device")
    if there and function not in COPIES:
        _check(function, args, tensors)
    if wanted is not None:
        is_there, kwargs = torch.device(wanted).type == NAME, {**kwargs, "device": "cpu"}
    elif function is ATEN.copy_.default:
        is_there = isinstance(args[0], Elsewhere)
    else:
        is_there = bool(there)
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not is_there:
        return result
    own = {id(value.held): value for value in there}  # what an operation in place returns is its argument
    return tree_map(lambda value: own[id(value)] if id(value) in own else _put(value), result)


def _check(function: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    if function in INDEXED and isinstance(args[0], Elsewhere):
        tensors = [value for value in (args[0], *args[2:]) if isinstance(value, torch.Tensor)]
    here = [tuple(value.shape) for value in tensors if not isinstance(value, Elsewhere) and value.dim()]
    if here:
        lines = [
            f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if "/ubmd/" in frame.filename
        ]
        _faults.append(f"{function}: tensors of shapes {here} are on the CPU, others are not ({' '.join(lines[-1:])})")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _put(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, torch.Tensor) else value


class _MakesTensors(TorchDispatchMode):
    """Operations without arguments on the device, such as ``torch.zeros(3, device=...)``."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(function, args, kwargs or {})


def _empty(size: Any, stride: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Elsewhere:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: torch.Tensor, target: torch.Tensor, _: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target


@cache
def _register() -> torch.library.Library:
    """The device, with the two operations that torch calls itself: for numbers and indices that are Python's."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", _empty, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return library


def put(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The same module, with its parameters and buffers on the device (not its constants); returns it."""
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            part._c.setattr(name, value.detach().to(torch.device(NAME, 0)))
    return module


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, for a ``with`` statement; MixedDevices at its end, if there were such operations."""
    _register()
    # torch's threads for derivatives are those of the devices at the first derivative
    _faults.clear()
    try:
        with _MakesTensors(), torch.autograd.set_multithreading_enabled(False):
            yield torch.device(NAME, 0)
    finally:
        if _faults:
            raise MixedDevices("; ".join(dict.fromkeys(_faults)))
