"""Structures as graphs: directed neighbour pairs within the cutoff, from vesin (any cell, any periodicity)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from vesin import NeighborList

from ubmd.errors import DataError

# ASE's Voigt order xx yy zz yz xz xy as row and column of the 3 x 3 tensor
VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))
PAIRS_PER_CHUNK = 20_000  # bounds the memory of one evaluation


@dataclass(frozen=True)
class Graph:
    """One structure as its directed pairs (i, j, image), sorted by centre i; labels are NaN where missing.

    species: int64 [n]; edge_index: int64 [2, P], row 0 the centres; edge_vector: float64 [P, 3] = x_j - x_i in Å;
    volume: Å^3 (0 without a cell); energy: eV; forces: float64 [n, 3], eV/Å; stress: float64 [6], eV/Å^3, ASE order.
    """

    species: Tensor
    edge_index: Tensor
    edge_vector: Tensor
    volume: float
    energy: float
    forces: Tensor
    stress: Tensor

    @property
    def n_atoms(self) -> int:
        return len(self.species)


@dataclass(frozen=True)
class Batch:
    """Several graphs side by side: N atoms, P pairs, S structures.

    species [N], edge_index [2, P], edge_vector [P, 3], structure [N] (the structure that owns each atom),
    counts [S], volume [S], energy [S], forces [N, 3], stress [S, 6]; units as in Graph.
    """

    species: Tensor
    edge_index: Tensor
    edge_vector: Tensor
    structure: Tensor
    counts: Tensor
    volume: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor

    @property
    def n_structures(self) -> int:
        return len(self.counts)


def build_graph(atoms: Atoms, elements: Sequence[str], cutoff: float) -> Graph:
    """Graph of one structure; labels are taken from its calculator results, if there are any.

    Raises:
        DataError: an element that is not in ``elements``, or positions or cell that are not finite.
    """
    index = {element: k for k, element in enumerate(elements)}
    missing = sorted(set(atoms.symbols) - set(index))
    if missing:
        raise DataError(f"Element {missing[0]} is not one of the model's elements ({' '.join(elements)}).")
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        raise DataError("Positions or cell contain values that are not finite numbers.")
    i, j, vectors = NeighborList(cutoff=cutoff, full_list=True, sorted=True).compute(
        points=atoms.positions, box=atoms.cell.array, periodic=atoms.pbc, quantities="ijD"
    )
    energy, forces, stress = _labels(atoms)
    return Graph(
        species=torch.tensor([index[symbol] for symbol in atoms.symbols], dtype=torch.int64),
        edge_index=torch.from_numpy(np.stack([i, j]).astype(np.int64)),
        edge_vector=torch.from_numpy(np.array(vectors, dtype=np.float64).reshape(-1, 3)),
        volume=abs(float(np.linalg.det(atoms.cell.array))),
        energy=energy,
        forces=torch.from_numpy(forces),
        stress=torch.from_numpy(stress),
    )


def _labels(atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces and stress kept by the calculator; NaN where there is none."""
    results = atoms.calc.results if atoms.calc is not None else {}
    forces = results.get("forces")
    stress = results.get("stress")
    return (
        float(results.get("energy", np.nan)),
        np.full((len(atoms), 3), np.nan) if forces is None else np.array(forces, dtype=np.float64),
        np.full(6, np.nan) if stress is None else np.array(stress, dtype=np.float64),
    )


def collate(graphs: Sequence[Graph]) -> Batch:
    """Put graphs side by side; atom indices of the pairs are shifted, nothing is padded."""
    counts = torch.tensor([graph.n_atoms for graph in graphs])
    first_atom = torch.cumsum(counts, 0) - counts
    return Batch(
        species=torch.cat([graph.species for graph in graphs]),
        edge_index=torch.cat(
            [graph.edge_index + first for graph, first in zip(graphs, first_atom, strict=True)], dim=1
        ),
        edge_vector=torch.cat([graph.edge_vector for graph in graphs]),
        structure=torch.repeat_interleave(torch.arange(len(graphs)), counts),
        counts=counts,
        volume=torch.tensor([graph.volume for graph in graphs], dtype=torch.float64),
        energy=torch.tensor([graph.energy for graph in graphs], dtype=torch.float64),
        forces=torch.cat([graph.forces for graph in graphs]),
        stress=torch.stack([graph.stress for graph in graphs]),
    )


def chunks(graphs: Iterable[Graph]) -> Iterator[Batch]:
    """Collate graphs into batches of at most PAIRS_PER_CHUNK pairs (a larger graph is a batch of its own)."""
    waiting: list[Graph] = []
    pairs = 0
    for graph in graphs:
        size = graph.edge_index.size(1)
        if waiting and pairs + size > PAIRS_PER_CHUNK:
            yield collate(waiting)
            waiting, pairs = [], 0
        waiting.append(graph)
        pairs += size
    if waiting:
        yield collate(waiting)


def scatter_forces(edge_index: Tensor, edge_gradient: Tensor, n_atoms: int) -> Tensor:
    """Forces -dE/dx [n_atoms, 3] from the gradient dE/d(edge_vector) [P, 3], where edge_vector = x_j - x_i."""
    forces = torch.zeros(n_atoms, 3, dtype=edge_gradient.dtype, device=edge_gradient.device)
    return forces.index_add(0, edge_index[0], edge_gradient).index_add(0, edge_index[1], -edge_gradient)


def strain_gradient(edge_vector: Tensor, edge_gradient: Tensor, owner: Tensor, n_structures: int) -> Tensor:
    """dE/d(strain) [S, 3, 3] (symmetrised; = V·stress) from per-pair gradients; owner [P] is each pair's structure."""
    outer = edge_vector.unsqueeze(2) * edge_gradient.unsqueeze(1)
    total = torch.zeros(n_structures, 3, 3, dtype=outer.dtype, device=outer.device).index_add(0, owner, outer)
    return 0.5 * (total + total.transpose(1, 2))
