"""What is pulled off a molecule looks unknown at every distance.

Of MACE: `test_mace.py`. The criterion can fail: features that vanish at the cutoff do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from bond_scan import PULLED, margin, scan, sets, trained, with_uncertainty
from torch import Tensor, nn

import ubmd
from ubmd.potentials.interface import RawModule
from ubmd.potentials.wrapping import wrap
from ubmd.settings import UncertaintySettings

tblite = pytest.importorskip("tblite.ase")


@pytest.fixture(scope="module")
def labels() -> tuple[list[Atoms], list[Atoms]]:
    return sets(tblite.TBLite(method="GFN2-xTB", verbosity=0))


@pytest.fixture(scope="module")
def networks(labels: tuple[list[Atoms], list[Atoms]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return trained(labels, 60, 0, tmp_path_factory.mktemp("ethanol"))


@pytest.mark.parametrize("kind", ["posterior", "last-layer", "distance"])
def test_what_is_pulled_away_looks_unknown(
    kind: str, labels: tuple[list[Atoms], list[Atoms]], networks: list[Path], tmp_path: Path
) -> None:
    """Of an ensemble this does not hold, see USAGE: its networks may agree on what none of them has seen."""
    model = with_uncertainty(kind, networks, labels, tmp_path / "model.pt")
    assert {bond: found for bond in PULLED if (found := margin(model, *labels, bond)) <= 1.0} == {}


class Vanishing(nn.Module):
    """Features that see the nearest neighbour alone, and fade away with it at the cutoff."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = ["C", "H", "O"]
        self.cutoff = 4.0
        self.layers = 1

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> tuple[Tensor, Tensor]:
        """Energies [n_local] and features [n_local, 9]."""
        r = edge_vector.double().square().sum(1).sqrt()
        weights = torch.exp(-20.0 * r) * (1.0 - r / 4.0).square()
        total = torch.full([n_local], 1e-40, dtype=torch.float64).index_add(0, edge_index[0], weights)
        nearest = torch.zeros(n_local, dtype=torch.float64).index_add(0, edge_index[0], weights * r) / total
        fading = nearest * (1.0 - nearest / 4.0).square()
        own = torch.stack([fading, fading * nearest, fading * nearest.square()], 1)
        kind = torch.nn.functional.one_hot(species[:n_local], 3).to(torch.float64)
        phi = (kind.unsqueeze(2) * own.unsqueeze(1)).flatten(1)
        return 1e-3 * phi.sum(1), phi


def test_features_that_vanish_at_the_cutoff_are_found_out(
    labels: tuple[list[Atoms], list[Atoms]], tmp_path: Path
) -> None:
    """An atom that has left is like none, and the one it has left still has a neighbour at the usual distance."""
    torch.jit.script(Vanishing()).save(str(tmp_path / "module.pt"))
    raw = RawModule(tmp_path / "module.pt", ["C", "H", "O"], 4.0, 9, backend={"name": "vanishing"})
    wrap(raw, *labels, UncertaintySettings(), tmp_path / "model.pt")
    model = ubmd.Model(tmp_path / "model.pt", "double")
    assert margin(model, *labels, "C-H") < 1.0
    lengths, values = scan(model, [*labels[0], *labels[1]], "C-H")
    assert values[np.abs(lengths - 3.0).argmin()] > 2.0 * values[-1]  # on its way it does look unknown
