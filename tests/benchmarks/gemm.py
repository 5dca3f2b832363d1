"""The bare matrix products of the network: the floor that times are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from clock import now
from torch import Tensor

HIDDEN = 512
INPUTS = {"light": 360, "paper": 910}


Multiply = Callable[[Tensor, Tensor], Tensor]


def multiplications() -> dict[str, Multiply]:
    """torch's own product, and the fastest at hand (the operator library's, where it is built)."""
    from ubmd import operators
    from ubmd.process import keep_freed_memory

    keep_freed_memory()  # as model and training do: results of products cost no page faults
    if not operators.available():
        return {"torch": torch.mm, "fastest": torch.mm}
    operators.load()
    return {"torch": torch.mm, "fastest": torch.ops.ubmd.product}


def inference_products(n_atoms: int, size: str, multiply: Multiply) -> tuple[Callable[[], None], float]:
    """The four products of energies and forces of n atoms, float32, and their floating-point operations.

    Forward: [n, F] x [F, 512], [n, 512] x [512, 512]; input gradient: [n, 512] x [512, 512], [n, 512] x [512, F].
    """
    inputs = INPUTS[size]
    x, hidden = torch.randn(n_atoms, inputs), torch.randn(n_atoms, HIDDEN)
    weight1, weight2 = torch.randn(HIDDEN, inputs), torch.randn(HIDDEN, HIDDEN)

    def run() -> None:
        multiply(x, weight1.T)
        multiply(hidden, weight2.T)
        multiply(hidden, weight2)
        multiply(hidden, weight1)

    return run, 2.0 * n_atoms * 2 * (inputs * HIDDEN + HIDDEN * HIDDEN)


def training_products(n_atoms: int, size: str, multiply: Multiply) -> Callable[[], None]:
    """The twelve products of a training step on energies and forces of n atoms, float32: six times a forward.

    Per layer (d_in x d_out = F x 512, 512 x 512): forward, input gradient, tangent, second input gradient, each
    n x d_in x d_out, and two weight gradients d_out x n x d_in.
    """
    layers = [_layer_products(n_atoms, width, multiply) for width in (INPUTS[size], HIDDEN)]

    def run() -> None:
        for layer in layers:
            layer()

    return run


def _layer_products(n: int, width: int, multiply: Multiply) -> Callable[[], None]:
    """Six products of one layer [n, width] -> [n, 512]."""
    x, z, weight = torch.randn(n, width), torch.randn(n, HIDDEN), torch.randn(HIDDEN, width)

    def run() -> None:
        for _ in range(2):
            multiply(x, weight.T)
            multiply(z, weight)
            multiply(z.T, x)

    return run


def seconds(run: Callable[[], None], repeats: int = 10) -> float:
    """Shortest of several calls, after one to warm up."""
    run()
    best = float("inf")
    for _ in range(repeats):
        start = now()
        run()
        best = min(best, now() - start)
    return best
