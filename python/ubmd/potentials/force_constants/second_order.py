"""Second-order force constants of the infinite crystal, for any number of sets of parameters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ubmd.errors import SettingsError
from ubmd.potentials.force_constants.basis import ClusterBasis, symmetric_embedding
from ubmd.potentials.force_constants.pairs import PAIRS, site_pairs

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Entry = tuple[Integers, Integers, Integers, Array]


def second_order(basis: ClusterBasis, parameters: Array, pairs: bool = True) -> Entry:
    """(first sublattice [N], second [N], cell of the second site [N, 3], force constants [N, 3, 3, M], eV/Å^2).

    One row per ordered pair of sites modulo translations, sites with themselves among them; rows of the same pair add.

    Args:
        basis: with a second order.
        parameters: M sets of them [P, M].
        pairs: whether the pair functions' second derivatives at the ideal crystal are part of it.

    Raises:
        SettingsError: the basis has no second order.
    """
    entries = [*_of_clusters(basis, parameters), *(_of_pair_functions(basis, parameters) if pairs else ())]
    first, second, offset, constants = (np.concatenate(part) for part in zip(*entries, strict=True))
    return first, second, offset, constants


def _of_clusters(basis: ClusterBasis, parameters: Array) -> Iterator[Entry]:
    if 2 not in basis.orders:
        raise SettingsError("Phonons and elastic constants need the second order: add it to crystal.cutoffs.")
    lattice, part = basis.lattice, basis.parts[basis.orders.index(2)]
    turns, sets = lattice.cartesian_rotations, parameters.shape[1]
    chosen = parameters[basis.parameter_orders == 2]
    for orbit, tensor in zip(part.orbits, part.tensors(chosen), strict=True):
        count, bodies = len(orbit.operations), len(orbit.sites)
        full = (symmetric_embedding(2) @ tensor if bodies == 1 else tensor).reshape(3, 3, sets)
        turn = turns[orbit.operations]
        turned = np.einsum("gac,cdm,gbd->gabm", turn, full, turn, optimize=True)
        operations = np.repeat(orbit.operations[:, None], bodies, axis=1)
        images = lattice.images(operations, np.tile(orbit.sites, (count, 1, 1)))
        for a, b in [(0, 0)] if bodies == 1 else [(0, 1), (1, 0)]:
            offset = images[:, b, :3] - images[:, a, :3]
            yield images[:, a, 3], images[:, b, 3], offset, turned if a <= b else turned.transpose(0, 2, 1, 3)


def _of_pair_functions(basis: ClusterBasis, parameters: Array) -> Iterator[Entry]:
    if basis.pairs is None:
        return
    chosen = parameters[basis.parameter_orders == PAIRS]
    for sublattice in range(len(basis.lattice.numbers)):
        sites, vector, kind = site_pairs(basis.pairs, sublattice, basis.pairs.cutoff)
        hessian = basis.pairs.hessian(vector, kind) @ chosen
        first = np.full(len(sites) + 1, sublattice)
        second = np.append(sites[:, 3], sublattice)
        offset = np.concatenate([sites[:, :3], np.zeros((1, 3), dtype=np.int64)])
        yield first, second, offset, np.concatenate([-hessian, hessian.sum(axis=0, keepdims=True)])
