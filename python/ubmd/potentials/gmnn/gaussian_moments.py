"""Gaussian moments and their invariants: the descriptor of the GM-NN potential, in plain (scriptable) torch.

Zaverkin & Kaestner, J. Chem. Theory Comput. 16, 5410 (2020); Zaverkin et al., npj Comput. Mater. 10, 83 (2024).
"""

import math
from itertools import combinations_with_replacement
from typing import Final

import torch
from torch import Tensor, nn

# The 20 distinct components of the moments of rank 0 to 3, as sorted index tuples: 1 | x y z | xx xy .. zz | xxx .. zzz
_COMPONENTS = [c for rank in range(4) for c in combinations_with_replacement(range(3), rank)]
_PLACE = {c: k for k, c in enumerate(_COMPONENTS)}


def _expansion(rank: int) -> list[int]:
    """Packed component of every entry of the full tensor of a rank, row-major (3^rank entries)."""
    entries: list[tuple[int, ...]] = [()]
    for _ in range(rank):
        entries = [(*entry, axis) for entry in entries for axis in range(3)]
    return [_PLACE[tuple(sorted(entry))] for entry in entries]


def count_invariants(n_radial: int) -> int:
    """Number of invariants for N_r radial functions: 360 for 5, 910 for 7."""
    n = n_radial
    return n + (3 + 2 * n) * n * (n + 1) // 2 + n * (n + 1) * (n + 2) // 6 + n**3


class GaussianMoments(nn.Module):
    """Invariants G_i [n_local, F] of the neighbourhood of every local atom.

    The parameter ``radial`` is B[Z_i, Z_j, s, b]; everything runs in its precision. With ``operators`` the operator
    library does the work wherever it can (on the CPU), and plain torch elsewhere.

    Besides ``forward`` there is a form without autograd at the caller's side, for pairs sorted by centre: ``evaluate``
    and ``vjp`` (and, only with operators, ``jvp`` and ``second_vjp`` for second derivatives). Its arguments are
    species int64 [n] of the centres, first int64 [n + 1] (the pairs of centre i are first[i] .. first[i + 1] - 1),
    neighbours int64 [P] (element index of each pair's neighbour) and vectors [P, 3] = x_j - x_i, Å, of any precision.
    """

    operators: Final[bool]
    centres: Tensor
    square_left: Tensor
    square_right: Tensor
    cube_left: Tensor
    cube_right: Tensor
    full: Tensor
    pair: Tensor
    pair_first: Tensor
    pair_second: Tensor
    triple: Tensor

    def __init__(self, n_elements: int, cutoff: float, n_radial: int, n_basis: int, r_min: float) -> None:
        super().__init__()
        self.operators = False
        self.n_elements = n_elements
        self.cutoff = float(cutoff)
        self.n_radial = n_radial
        self.n_basis = n_basis
        self.r_min = float(r_min)
        beta = n_basis**2 / cutoff**2
        self.beta = float(beta)
        # (2 beta / pi)^(1/4) of g_b, times N_b^(-1/2) of R_s
        self.prefactor = float((2 * beta / math.pi) ** 0.25 / math.sqrt(n_basis))
        self.radial = nn.Parameter(torch.empty(n_elements, n_elements, n_radial, n_basis))
        centres = [r_min + k * (cutoff - r_min) / n_basis for k in range(n_basis)]
        self.register_buffer("centres", torch.tensor(centres, dtype=torch.float64))
        self._register_indices(n_radial)

    def _register_indices(self, n: int) -> None:
        """Index tables: monomials from lower ranks, full tensors from packed ones, distinct index tuples."""
        pairs = [(r, s) for r in range(n) for s in range(r, n)]
        triples = [(r, s, t) for r, s in pairs for t in range(s, n)]
        rank2, rank3 = _COMPONENTS[4:10], _COMPONENTS[10:]
        tables = {
            "square_left": [c[0] for c in rank2],
            "square_right": [c[1] for c in rank2],
            "cube_left": [_PLACE[c[:2]] - 4 for c in rank3],
            "cube_right": [c[2] for c in rank3],
            "full": _expansion(1) + _expansion(2) + _expansion(3),
            "pair": [r * n + s for r, s in pairs],
            "pair_first": [r for r, _ in pairs],
            "pair_second": [s for _, s in pairs],
            "triple": [pairs.index((r, s)) * n + t for r, s, t in triples],
        }
        for name, table in tables.items():
            self.register_buffer(name, torch.tensor(table, dtype=torch.int64))

    def forward(self, species: Tensor, edge_index: Tensor, edge_vector: Tensor, n_local: int) -> Tensor:
        """Invariants [n_local, F].

        species: int64 [n] element indices (local atoms first, ghosts after them); edge_index: int64 [2, P], centres in
        row 0; edge_vector: [P, 3] = x_j - x_i, Å.
        """
        local, centre = species[:n_local], edge_index[0]
        neighbours = species.index_select(0, edge_index[1])
        if self.operators and edge_vector.is_cpu and bool((centre[1:] >= centre[:-1]).all()):
            first = torch.searchsorted(centre, torch.arange(n_local + 1))
            invariants: Tensor = torch.ops.ubmd.gaussian_moments(
                local, first, neighbours, edge_vector, self.radial, self.cutoff, self.r_min
            )
            return invariants
        return self.invariants(self.moments(local, centre, neighbours, edge_vector))

    def evaluate(
        self, species: Tensor, first: Tensor, neighbours: Tensor, vectors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Invariants [n, F], detached, and the state for ``vjp``."""
        if self.operators and vectors.is_cpu:
            moments = torch.ops.ubmd.moments(species, first, neighbours, vectors, self.radial, self.cutoff, self.r_min)
            invariants = torch.ops.ubmd.invariants(moments, self.n_radial)
            return invariants, [species, first, neighbours, vectors, moments]
        # A leaf of its own graph, whatever the caller's mode is. (TorchScript has no torch.enable_grad.)
        gradients = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        leaf = vectors.detach().requires_grad_(True)
        invariants = self.attached(species, first, neighbours, leaf)
        torch.set_grad_enabled(gradients)
        return invariants.detach(), [leaf, invariants]

    def attached(self, species: Tensor, first: Tensor, neighbours: Tensor, vectors: Tensor) -> Tensor:
        """Invariants [n, F], attached to the graph of the vectors, by plain torch."""
        atoms = torch.arange(species.size(0), device=species.device)
        centre = torch.repeat_interleave(atoms, first[1:] - first[:-1])
        return self.invariants(self.moments(species, centre, neighbours, vectors))

    def vjp(self, state: list[Tensor], cotangent: Tensor) -> Tensor:
        """d(sum cotangent·G)/d vectors [P, 3] (float64) for a cotangent [n, F]; may be called several times."""
        if self.operators and len(state) > 2:
            species, first, neighbours, vectors, moments = state
            cotangent = torch.ops.ubmd.invariants_vjp(moments, self.n_radial, cotangent)
            product: Tensor = torch.ops.ubmd.moments_vjp(
                species, first, neighbours, vectors, self.radial, self.cutoff, self.r_min, cotangent
            )
            return product
        leaf, invariants = state
        if leaf.size(0) == 0:
            return torch.zeros_like(leaf, dtype=torch.float64)
        cotangents: list[Tensor | None] = [cotangent]
        gradient = torch.autograd.grad([invariants], [leaf], cotangents, retain_graph=True)[0]
        assert gradient is not None
        return gradient.to(torch.float64)

    def jvp(self, state: list[Tensor], direction: Tensor) -> tuple[Tensor, Tensor]:
        """Directional derivatives of invariants [n, F] and moments along a direction [P, 3] of the vectors."""
        species, first, neighbours, vectors, moments = state
        change = torch.ops.ubmd.moments_jvp(
            species, first, neighbours, vectors, self.radial, self.cutoff, self.r_min, direction
        )
        return torch.ops.ubmd.invariants_jvp(moments, self.n_radial, change), change

    def second_vjp(
        self, state: list[Tensor], direction: Tensor, change: Tensor, cotangent: Tensor, change_cotangent: Tensor
    ) -> Tensor:
        """d/d vectors [P, 3] (float64) of sum cotangent·G + sum change_cotangent·(dG along the direction).

        ``change``: of the moments, from ``jvp``.
        """
        species, first, neighbours, vectors, moments = state
        moments_bar = torch.ops.ubmd.invariants_second(moments, self.n_radial, change, cotangent, change_cotangent)
        change_bar = torch.ops.ubmd.invariants_vjp(moments, self.n_radial, change_cotangent)
        found: tuple[Tensor, Tensor] = torch.ops.ubmd.moments_second(
            species,
            first,
            neighbours,
            vectors,
            self.radial,
            self.cutoff,
            self.r_min,
            direction,
            moments_bar,
            change_bar,
            True,
            False,
        )
        return found[0]

    def moments(self, species: Tensor, centre: Tensor, neighbours: Tensor, vectors: Tensor) -> Tensor:
        """Packed moments T^L_{i,s} [n, N_r, 20] = sum_j R_s(r_ij; Z_i, Z_j) u^{(x) L}, L = 0..3.

        species [n] of the centres; centre [P], neighbours [P] (element index) and vectors [P, 3] of the pairs.
        """
        n = species.size(0)
        vector = vectors.to(self.radial.dtype)
        distance = torch.sqrt((vector * vector).sum(1, keepdim=True))
        # Neighbours are summed per (centre, neighbour element, Gaussian) first: B then acts on atoms, not on pairs.
        products = (self.basis(distance).unsqueeze(2) * self.monomials(vector / distance).unsqueeze(1)).flatten(1)
        slot = centre * self.n_elements + neighbours
        sums = torch.zeros(n * self.n_elements, self.n_basis * 20, dtype=products.dtype, device=products.device)
        sums = sums.index_add(0, slot, products).view(n, self.n_elements * self.n_basis, 20)
        coefficients = self.radial.permute(0, 2, 1, 3).flatten(2).index_select(0, species)
        return torch.bmm(coefficients, sums)

    def basis(self, distance: Tensor) -> Tensor:
        """f_c(r) N_b^(-1/2) g_b(r), [P, N_b], for distances [P, 1] in Å; zero from the cutoff on."""
        gaussians = torch.exp(-self.beta * (distance - self.centres.to(distance.dtype)).square())
        inside = torch.clamp(distance, max=self.cutoff)
        return (self.prefactor * (0.5 + 0.5 * torch.cos(math.pi / self.cutoff * inside))) * gaussians

    def monomials(self, unit: Tensor) -> Tensor:
        """The 20 distinct products of the components of unit vectors [P, 3], rank 0 to 3."""
        square = unit.index_select(1, self.square_left) * unit.index_select(1, self.square_right)
        cube = square.index_select(1, self.cube_left) * unit.index_select(1, self.cube_right)
        return torch.cat([torch.ones_like(unit[:, :1]), unit, square, cube], dim=1)

    def invariants(self, moments: Tensor) -> Tensor:
        """The eight families of full contractions, in the order of the published table; [n, N_r, 20] -> [n, F]."""
        n, r = moments.size(0), self.n_radial
        full = moments.index_select(2, self.full)
        t1, t2, t3 = full[:, :, :3], full[:, :, 3:12], full[:, :, 12:]
        t2t = t2.transpose(1, 2)
        squares = [torch.bmm(t, t.transpose(1, 2)).view(n, r * r).index_select(1, self.pair) for t in (t1, t2, t3)]
        # 4: T2_r,ij T2_s,ik;  5: T1_r,i T1_s,j;  6: T3_r,ijk T3_s,ijl  (each for r <= s, [n, pairs, 9]), then with T2_t
        t2rows = t2.reshape(n, r * 3, 3)
        t3rows = t3.reshape(n, r, 9, 3).transpose(2, 3).reshape(n, r * 3, 9)
        four = self._pairs_of_blocks(torch.bmm(t2rows, t2rows.transpose(1, 2)))
        five = (
            t1.index_select(1, self.pair_first).unsqueeze(3) * t1.index_select(1, self.pair_second).unsqueeze(2)
        ).flatten(2)
        six = self._pairs_of_blocks(torch.bmm(t3rows, t3rows.transpose(1, 2)))
        with_t2 = torch.bmm(torch.cat([four, five, six], dim=1), t2t)
        p = self.pair.numel()
        # 7: T3_r,ijk T2_s,ij -> [n, (r, k), s], then T1_t,k
        seven = torch.bmm(t3rows, t2t).view(n, r, 3, r).transpose(2, 3).reshape(n, r * r, 3)
        seven = torch.bmm(seven, t1.transpose(1, 2))
        return torch.cat(
            [
                moments[:, :, 0],
                squares[0],
                squares[1],
                squares[2],
                with_t2[:, :p].flatten(1).index_select(1, self.triple),
                with_t2[:, p:].flatten(1),
                seven.flatten(1),
            ],
            dim=1,
        )

    def _pairs_of_blocks(self, blocks: Tensor) -> Tensor:
        """[n, (r, k), (s, l)] -> the 3 x 3 blocks (k, l) of the pairs r <= s, [n, pairs, 9]."""
        n, r = blocks.size(0), self.n_radial
        by_pair = blocks.view(n, r, 3, r, 3).transpose(2, 3).reshape(n, r * r, 9)
        return by_pair.index_select(1, self.pair)
