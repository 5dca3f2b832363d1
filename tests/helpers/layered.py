"""A TorchScript module of a user, with message passing in plain torch, as `ubmd wrap` takes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layered(nn.Module):
    """Scalar features that atoms pass on ``steps`` times; weights are drawn from a seed."""

    def __init__(self, elements: list[str], cutoff: float, steps: int, said: int = 0, width: int = 6) -> None:
        """``said``: layers that it claims to have (0: the truth)."""
        super().__init__()
        self.elements = elements
        self.cutoff = cutoff
        self.layers = said or steps
        self.steps = steps
        self.width = width
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(len(elements), width, generator=generator, dtype=torch.float64))
        self.mixing = nn.Parameter(torch.randn(steps, width, width, generator=generator, dtype=torch.float64) / width)

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """Energies [n_local] and features [n_local, width]."""
        r = edge_vector.to(torch.float64).square().sum(1, keepdim=True).add(1e-30).sqrt() / self.cutoff
        weight = (1.0 - r.clamp(max=1.0)).square() * torch.cos(4.0 * r)
        x = self.embedding.index_select(0, species)
        for k in range(self.steps):
            messages = weight * x.index_select(0, edge_index[1])
            gathered = torch.zeros_like(x).index_add(0, edge_index[0], messages)
            x = x + torch.tanh(gathered @ self.mixing[k])
        phi = x[:n_local]
        return phi.square().sum(1), phi
