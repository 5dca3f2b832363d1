"""The bare matrix products of the network: the floor that times are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from clock import now
from torch import Tensor

HIDDEN = 512
INPUTS = {"light": 360, "paper": 910}


def inference_products(n_atoms: int, size: str) -> tuple[Callable[[], None], float]:
    """The four products of energies and forces of n atoms, float32, and their floating-point operations.

    Forward: [n, F] x [F, 512], [n, 512] x [512, 512]; input gradient: [n, 512] x [512, 512], [n, 512] x [512, F].
    """
    inputs = INPUTS[size]
    x, hidden = torch.randn(n_atoms, inputs), torch.randn(n_atoms, HIDDEN)
    weight1, weight2 = torch.randn(HIDDEN, inputs), torch.randn(HIDDEN, HIDDEN)
    to_hidden, to_inputs = torch.empty(n_atoms, HIDDEN), torch.empty(n_atoms, inputs)

    def run() -> None:
        torch.mm(x, weight1.T, out=to_hidden)
        torch.mm(hidden, weight2.T, out=to_hidden)
        torch.mm(hidden, weight2, out=to_hidden)
        torch.mm(hidden, weight1, out=to_inputs)

    return run, 2.0 * n_atoms * 2 * (inputs * HIDDEN + HIDDEN * HIDDEN)


def training_products(n_atoms: int, size: str) -> Callable[[], None]:
    """The twelve products of a training step on energies and forces of n atoms, float32: six times a forward.

    Per layer (d_in x d_out = F x 512, 512 x 512): forward, input gradient, tangent, second input gradient, each
    n x d_in x d_out, and two weight gradients d_out x n x d_in.
    """
    inputs = INPUTS[size]
    layers = [_layer_products(n_atoms, inputs), _layer_products(n_atoms, HIDDEN)]

    def run() -> None:
        for layer in layers:
            layer()

    return run


def _layer_products(n: int, width: int) -> Callable[[], None]:
    """Six products of one layer [n, width] -> [n, 512]."""
    x, z = torch.randn(n, width), torch.randn(n, HIDDEN)
    weight, gradient = torch.randn(HIDDEN, width), torch.empty(HIDDEN, width)
    to_z, to_x = torch.empty(n, HIDDEN), torch.empty(n, width)

    def run() -> None:
        for _ in range(2):
            torch.mm(x, weight.T, out=to_z)
            torch.mm(z, weight, out=to_x)
            _weight_gradient(z, x, gradient)

    return run


def _weight_gradient(z: Tensor, x: Tensor, gradient: Tensor) -> None:
    torch.mm(z.T, x, out=gradient)


def seconds(run: Callable[[], None], repeats: int = 10) -> float:
    """Shortest of several calls, after one to warm up."""
    run()
    best = float("inf")
    for _ in range(repeats):
        start = now()
        run()
        best = min(best, now() - start)
    return best
