"""Structures as graphs: directed neighbour pairs within the cutoff (any cell, any periodicity)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from ubmd.data.constraints import is_fixed
from ubmd.data.geometry import check_pairs, neighbours
from ubmd.data.periodicity import is_partly_periodic, projector
from ubmd.errors import DataError

# ASE's Voigt order xx yy zz yz xz xy as row and column of the 3 x 3 tensor
VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))
_FULL = [[0, 5, 4], [5, 1, 3], [4, 3, 2]]  # and the way back
# Bounds the memory of one evaluation: the plain-torch descriptor keeps kilobytes per pair. Larger ones are no faster.
PAIRS_PER_CHUNK = 5_000
PAIRS_PER_CHUNK_ON_GPU = 100_000  # many pairs at once are what a GPU is for
ON_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Graph:
    """One structure as its directed pairs (i, j, image), sorted by centre i; labels are NaN where missing.

    species: int64 [n]; edge_index: int64 [2, P], row 0 the centres; edge_vector: float64 [P, 3] = x_j - x_i in Å;
    first: int64 [n + 1], the pairs of centre i are first[i] .. first[i + 1] - 1; neighbours: int64 [P], element index;
    volume: Å^3 (0 without a cell); projector: float64 [3, 3] of slabs and wires, onto their periodic directions
    (None: stresses have all components); energy: eV; forces: float64 [n, 3], eV/Å; stress: float64 [6], eV/Å^3, ASE
    order; fixed: bool [n], the atoms whose forces do not count because they are kept fixed (None: all count).
    """

    species: Tensor
    edge_index: Tensor
    edge_vector: Tensor
    first: Tensor
    neighbours: Tensor
    volume: float
    projector: Tensor | None
    energy: float
    forces: Tensor
    stress: Tensor
    fixed: Tensor | None

    @property
    def n_atoms(self) -> int:
        return len(self.species)

    @property
    def n_pairs(self) -> int:
        return len(self.edge_vector)

    def to(self, device: torch.device) -> Graph:
        """The same on a device of torch."""
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """Several graphs side by side: N atoms, P pairs, S structures.

    species [N], edge_index [2, P], edge_vector [P, 3], first [N + 1], neighbours [P], structure [N] (the structure
    that owns each atom), counts [S], pair_counts (S numbers; the pairs of a structure follow one another),
    volume [S], projector [S, 3, 3] or None, energy [S], forces [N, 3], stress [S, 6], fixed [N] or None; units as in
    Graph.
    """

    species: Tensor
    edge_index: Tensor
    edge_vector: Tensor
    first: Tensor
    neighbours: Tensor
    structure: Tensor
    counts: Tensor
    pair_counts: list[int]
    volume: Tensor
    projector: Tensor | None
    energy: Tensor
    forces: Tensor
    stress: Tensor
    fixed: Tensor | None

    @property
    def n_structures(self) -> int:
        return len(self.counts)

    def to(self, device: torch.device) -> Batch:
        """The same on a device of torch."""
        return _moved(self, device)

    @property
    def any_stress(self) -> bool:
        """Whether a structure has a stress label."""
        return bool(torch.isfinite(self.stress).all(dim=1).any())

    def by_structure(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values of pairs [P, ...] as one view per structure."""
        views: tuple[Tensor, ...] = values.split(self.pair_counts)
        return views

    def forces_from(self, edge_gradient: Tensor) -> Tensor:
        """`scatter_forces` of all pairs, several times as fast, but not differentiable."""
        own = torch.segment_reduce(edge_gradient, "sum", offsets=self.first, axis=0)
        others = torch.zeros_like(own).index_add_(0, self.edge_index[1], edge_gradient)
        return own.sub_(others)

    def virials_from(self, edge_gradient: Tensor) -> Tensor:
        """`strain_gradient` of all pairs, several times as fast, but not differentiable."""
        parts = zip(self.by_structure(self.edge_vector), self.by_structure(edge_gradient), strict=True)
        total = torch.stack([vectors.t() @ gradient for vectors, gradient in parts])
        return 0.5 * (total + total.transpose(1, 2))

    def stress_within(self, six: Tensor) -> Tensor:
        """Stresses [S, 6] without the components along the free directions of slabs and wires."""
        if self.projector is None:
            return six
        full = six[:, torch.tensor(_FULL)]
        return (self.projector @ full @ self.projector)[:, VOIGT[0], VOIGT[1]]


_Part = TypeVar("_Part", Graph, Batch)


def _moved(part: _Part, device: torch.device) -> _Part:
    """A copy with all tensors on a device; on the CPU it shares their memory."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    tensors: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(part, **tensors)


def build_graph(atoms: Atoms, elements: Sequence[str], cutoff: float) -> Graph:
    """Graph of one structure; labels are taken from its calculator results, if there are any.

    Raises:
        DataError: an element that is not in ``elements``, two atoms at the same place, or positions or a cell that no
            neighbour search can work with.
    """
    species = _species(atoms, elements)
    i, j, vectors = neighbours(atoms, cutoff)
    check_pairs(atoms, i, j, vectors)
    energy, forces, stress = _labels(atoms)
    edge_index = np.stack([i, j])
    neighbour_counts = np.bincount(edge_index[0], minlength=len(atoms))
    return Graph(
        species=torch.from_numpy(species),
        edge_index=torch.from_numpy(edge_index),
        edge_vector=torch.from_numpy(vectors),
        first=torch.from_numpy(np.concatenate([[0], np.cumsum(neighbour_counts)]).astype(np.int64)),
        neighbours=torch.from_numpy(species[edge_index[1]]),
        volume=abs(float(np.linalg.det(atoms.cell.array))) if atoms.cell.array.any() else 0.0,
        projector=torch.from_numpy(projector(atoms)) if is_partly_periodic(atoms) else None,
        energy=energy,
        forces=torch.from_numpy(forces),
        stress=torch.from_numpy(stress),
        fixed=torch.from_numpy(fixed) if (fixed := is_fixed(atoms)).any() else None,
    )


def _species(atoms: Atoms, elements: Sequence[str]) -> np.ndarray:
    """Index of each atom's element [n]; DataError for one that is not there."""
    index = {atomic_numbers[element]: k for k, element in enumerate(elements)}
    numbers = atoms.numbers.tolist()
    try:
        return np.array([index[number] for number in numbers], dtype=np.int64)
    except KeyError:
        missing = min(chemical_symbols[number] for number in numbers if number not in index)
        raise DataError(f"Element {missing} is not one of the model's elements ({' '.join(elements)}).") from None


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
    """Put graphs side by side; the indices of atoms and pairs are shifted, nothing is padded."""
    counts = torch.tensor([graph.n_atoms for graph in graphs])
    pair_counts = torch.tensor([graph.n_pairs for graph in graphs])
    first_atom = torch.cumsum(counts, 0) - counts
    first_pair = torch.cumsum(pair_counts, 0) - pair_counts
    edge_index = torch.cat([graph.edge_index for graph in graphs], dim=1)
    edge_index += torch.repeat_interleave(first_atom, pair_counts)
    first = torch.cat([*(graph.first[:-1] for graph in graphs), pair_counts.sum().unsqueeze(0)])
    first[:-1] += torch.repeat_interleave(first_pair, counts)
    return Batch(
        species=torch.cat([graph.species for graph in graphs]),
        edge_index=edge_index,
        edge_vector=torch.cat([graph.edge_vector for graph in graphs]),
        first=first,
        neighbours=torch.cat([graph.neighbours for graph in graphs]),
        structure=torch.repeat_interleave(torch.arange(len(graphs)), counts),
        counts=counts,
        pair_counts=pair_counts.tolist(),
        volume=torch.tensor([graph.volume for graph in graphs], dtype=torch.float64),
        projector=_projectors(graphs),
        energy=torch.tensor([graph.energy for graph in graphs], dtype=torch.float64),
        forces=torch.cat([graph.forces for graph in graphs]),
        stress=torch.stack([graph.stress for graph in graphs]),
        fixed=_fixed(graphs),
    )


def _projectors(graphs: Sequence[Graph]) -> Tensor | None:
    if all(graph.projector is None for graph in graphs):
        return None
    unit = torch.eye(3, dtype=torch.float64)
    return torch.stack([unit if graph.projector is None else graph.projector for graph in graphs])


def _fixed(graphs: Sequence[Graph]) -> Tensor | None:
    if all(graph.fixed is None for graph in graphs):
        return None
    return torch.cat([torch.zeros(g.n_atoms, dtype=torch.bool) if g.fixed is None else g.fixed for g in graphs])


def chunks(
    graphs: Iterable[Graph],
    max_pairs: int | None = None,
    max_atoms: int | None = None,
    device: torch.device = ON_CPU,
) -> Iterator[Batch]:
    """Collate graphs into batches on a device, of at most so many pairs and atoms; a larger graph is one of its own.

    ``max_pairs`` = None: PAIRS_PER_CHUNK, or PAIRS_PER_CHUNK_ON_GPU; ``max_atoms`` = None: any number.
    """
    usual = PAIRS_PER_CHUNK if device.type == "cpu" else PAIRS_PER_CHUNK_ON_GPU
    limits = usual if max_pairs is None else max_pairs, math.inf if max_atoms is None else max_atoms
    waiting: list[Graph] = []
    pairs = atoms = 0
    for graph in graphs:
        if waiting and (pairs + graph.n_pairs > limits[0] or atoms + graph.n_atoms > limits[1]):
            yield collate(waiting).to(device)
            waiting, pairs, atoms = [], 0, 0
        waiting.append(graph)
        pairs += graph.n_pairs
        atoms += graph.n_atoms
    if waiting:
        yield collate(waiting).to(device)


def scatter_forces(edge_index: Tensor, edge_gradient: Tensor, n_atoms: int) -> Tensor:
    """Forces -dE/dx [n_atoms, 3] from the gradient dE/d(edge_vector) [P, 3], where edge_vector = x_j - x_i."""
    forces = torch.zeros(n_atoms, 3, dtype=edge_gradient.dtype, device=edge_gradient.device)
    return forces.index_add(0, edge_index[0], edge_gradient).index_add(0, edge_index[1], -edge_gradient)


def strain_gradient(edge_vector: Tensor, edge_gradient: Tensor, owner: Tensor, n_structures: int) -> Tensor:
    """dE/d(strain) [S, 3, 3] (symmetrised; = V·stress) from per-pair gradients; owner [P] is each pair's structure."""
    outer = edge_vector.unsqueeze(2) * edge_gradient.unsqueeze(1)
    total = torch.zeros(n_structures, 3, 3, dtype=outer.dtype, device=outer.device).index_add(0, owner, outer)
    return 0.5 * (total + total.transpose(1, 2))


def structure_means(phi: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean features [S, p] of the structures of a batch from atomic features [N, p]."""
    sums = phi.new_zeros(batch.n_structures, phi.size(1)).index_add(0, batch.structure, phi)
    return sums / batch.counts.unsqueeze(1)
