"""The compiled operators ``torch.ops.ubmd.*`` (``libubmd_ops.so``; ``cpp/ops`` says what they compute).

The LAMMPS plugin links the same file, so that a process which has both has one copy of the operators.
"""

import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

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
    try:
        check_version(torch.__version__)
        torch.ops.load_library(str(library_file()))
    except (ImportError, OSError) as error:
        raise ModelError(
            f"the compiled operators {library_file()} can't be loaded ({error}): reinstall ubmd, or export the model "
            "without operators"
        ) from error


def check_version(found: str) -> None:
    """Raise ModelError if the operators were built for another torch than `found`, whose C++ classes may differ."""
    from ubmd import _cpp

    if found.split("+")[0] != _cpp.torch_version:
        raise ModelError(
            f"the compiled operators were built for torch {_cpp.torch_version} but this is {found}: "
            f"run 'pip install torch=={_cpp.torch_version}'"
        )


def available() -> bool:
    """Whether the operators can be used here (they are loaded then); a warning says why not."""
    try:
        load()
    except ModelError as error:
        warnings.warn(f"{error}. Until then networks run without them, several times slower.", stacklevel=2)
        return False
    return True


def chosen(wanted: bool | None) -> bool:
    """Whether a file calls the operators (None: if they can be loaded here); ModelError if wanted but not loadable."""
    if wanted:
        load()
    return available() if wanted is None else wanted


def use_operators(module: nn.Module, wanted: bool) -> None:
    """Let a module and its parts call the compiled operators, or plain torch for everything.

    A part that can do either has an attribute ``operators``, False in new modules. TorchScript takes it as a constant,
    so that a file of a module without operators needs no library.
    """
    for part in module.modules():
        if hasattr(part, "operators"):
            setattr(part, "operators", wanted)  # noqa: B010 (a constant of TorchScript, so Final)


ACTIVATION_SCALE = 1.6765324703310907  # unit second moment of SiLU under N(0, 1)


class Products(nn.Module):
    """Matrix products and activations of closed forms: those of the operator library where it is used.

    Where a derivative is wanted, or off the CPU, the library itself takes plain torch.
    """

    operators: Final[bool]

    def __init__(self) -> None:
        super().__init__()
        self.operators = False

    def product(self, left: Tensor, right: Tensor, add: Tensor | None = None) -> Tensor:
        """left @ right [n, m], plus ``add`` ([m] or [n, m]) if given."""
        if self.operators:
            result: Tensor = torch.ops.ubmd.product(left, right, add)
            return result
        return torch.mm(left, right) if add is None else torch.addmm(add, left, right)

    def activation(self, z: Tensor, order: int) -> list[Tensor]:
        """`activation`, in one pass where there are operators."""
        if self.operators:
            orders: list[Tensor] = torch.ops.ubmd.activation(z, order)
            return orders
        return activation(z, order)


def activation(z: Tensor, order: int, scale: float = ACTIVATION_SCALE) -> list[Tensor]:
    """Scaled SiLU c z sigma(z), its derivative (order 1) and its second derivative (order 2), differentiable."""
    sigmoid = torch.sigmoid(z)
    x = z * sigmoid
    rest = 1.0 - sigmoid
    results = [scale * x, scale * (sigmoid + x * rest)]
    if order > 1:
        results.append((scale * sigmoid * rest) * (2.0 + z * (1.0 - 2.0 * sigmoid)))
    return results
