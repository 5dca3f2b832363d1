"""Curvature of the energy at the ideal crystal, and fits that may not have a negative one.

The energy of a wave of displacements v (complex, a vector per sublattice) is v†Φ(q)v/2 per cell, Φ(q) the second-order
force constants summed with the phases of q; it is linear in the parameters. A polynomial of second order has a lower
bound only if no Φ(q) has a negative eigenvalue, whatever pair functions (which are bounded) are added; and the ideal
crystal is a minimum only if the same holds with the second derivatives of the pair functions. Both are asked for.

The fit is then a quadratic programme: of all parameters without negative curvature, those nearest to the plain fit in
the metric of its covariance S, min (θ - θ0)ᵀS⁻¹(θ - θ0) subject to v†Φ(q)v ≥ MARGIN. It is solved with cutting planes:
whatever wave has negative energy becomes a row of a least distance problem, whose dual is one of non-negative least
squares (Lawson and Hanson, Solving Least Squares Problems, SIAM (1995), chapter 23), until there is none. Rows are no
data: noise, prior widths and covariance stay those of the plain fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls  # type: ignore[import-untyped]

from ubmd.errors import DataError
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.lattice import Lattice
from ubmd.potentials.force_constants.phonons import HarmonicCrystal
from ubmd.potentials.force_constants.regression import Posterior
from ubmd.potentials.force_constants.second_order import second_order

Array = NDArray[np.float64]
Waves = NDArray[np.complex128]

TOLERANCE = 1e-8  # eV/Å^2, of what counts as negative in a fit
MARGIN = 2e-4  # eV/Å^2: a wave that had negative energy gets at least this curvature
UNSTABLE = -0.005  # eV/Å^2: what `ubmd train` calls negative in a plain fit
LENGTH = 30.0  # Å: waves of boxes of this size are tested, beside those of multiples of the training cell
MULTIPLES = 3  # of each vector of the training cell
MOST_ROUNDS = 200
_RESOLUTION = 10**7


@dataclass(frozen=True, eq=False)
class Lowest:
    """The wave with the lowest curvature: eV/Å^2 (1/2 v†Φv for |v| = 1 is its energy), and its wave vector [3]."""

    curvature: float
    q: Array


@dataclass(frozen=True, eq=False)
class Stabilised:
    """A fit without negative curvature: the posterior with another mean, and the number of rows it took."""

    posterior: Posterior
    rows: int
    lowest_before: float


def wave_vectors(lattice: Lattice, boxes: Iterable[NDArray[np.int64]]) -> Array:
    """Wave vectors [K, 3] in units of the reciprocal cell, one of q and -q.

    Those of all multiples of boxes (integer matrices, rows in primitive vectors) up to MULTIPLES along each vector, and
    an even mesh.
    """
    heights = 1.0 / np.linalg.norm(np.linalg.inv(lattice.cell), axis=0)
    meshes = [np.diag(np.maximum(np.ceil(LENGTH / heights), 1).astype(np.int64))]
    for box in boxes:
        meshes += [np.array(factors)[:, None] * box for factors in product(range(1, MULTIPLES + 1), repeat=3)]
    return commensurate(meshes)


def commensurate(boxes: Iterable[NDArray[np.int64]]) -> Array:
    """Wave vectors [K, 3] of boxes (integer matrices), one of q and -q."""
    return _one_of_each(np.concatenate([_commensurate(box) for box in boxes]))


def lowest_curvature(basis: ClusterBasis, parameters: Array, q: Array) -> Lowest:
    """Of the whole energy, pair functions included, at wave vectors [K, 3]."""
    return Curvature(basis).lowest(parameters, q)


def stabilised(basis: ClusterBasis, posterior: Posterior, q: Array) -> Stabilised:
    """The fit with no curvature below -TOLERANCE at wave vectors [K, 3], of force constants alone and of the whole.

    Raises:
        DataError: there is no such fit.
    """
    curvature = Curvature(basis)
    parts = [curvature] if basis.pairs is None else [curvature, curvature.without_pairs()]
    before = min(part.lowest(posterior.mean, q).curvature for part in parts)
    rows = np.zeros((0, basis.n_parameters))
    mean = posterior.mean
    for _ in range(MOST_ROUNDS):
        new = np.concatenate([part.rows(mean, q) for part in parts])
        if not len(new):
            return Stabilised(replace(posterior, mean=mean), len(rows), before)
        rows = np.concatenate([rows, new])
        bounds = MARGIN - rows @ posterior.mean
        mean = posterior.mean + posterior.factor @ nearest(rows @ posterior.factor, bounds)
    raise DataError(
        f"Negative curvatures are left after {MOST_ROUNDS} rounds: raise the cutoff of order 2, or set "
        "crystal.stable = false."
    )


def nearest(matrix: Array, bounds: Array) -> Array:
    """The shortest z [P] with G z ≥ h for G [M, P], h [M] (Lawson and Hanson's problem LDP).

    Raises:
        DataError: there is none.
    """
    size = np.linalg.norm(matrix, axis=1)
    size = np.where(size > 0.0, size, 1.0)
    stacked = np.vstack([(matrix / size[:, None]).T, bounds / size])
    target = np.zeros(len(stacked))
    target[-1] = 1.0
    weights, norm = nnls(stacked, target, maxiter=30 * stacked.shape[1] + 300)
    if norm < 1e-12:
        raise DataError("Rows contradict each other: no parameters fulfil all inequalities.")
    residual = stacked @ weights - target
    shortest: Array = -residual[:-1] / residual[-1]
    return shortest


class Curvature:
    """Φ(q) as a linear function of all parameters.

    Attributes:
        first, second: sublattices of ordered pairs of sites [N].
        offset: cell of the second site [N, 3].
        constants: force constants by parameters [N, 3, 3, P].
    """

    def __init__(self, basis: ClusterBasis, pairs: bool = True) -> None:
        self.basis = basis
        every = np.eye(basis.n_parameters)
        self.first, self.second, self.offset, self.constants = second_order(basis, every, pairs)

    def without_pairs(self) -> Curvature:
        """That of the force constants alone."""
        return Curvature(self.basis, pairs=False)

    def matrices(self, parameters: Array, q: Array) -> Waves:
        """Φ [K, 3S, 3S] at wave vectors [K, 3]; eV/Å^2."""
        return replace(self._crystal, constants=self.constants @ parameters).dynamical_matrices(q)

    def lowest(self, parameters: Array, q: Array) -> Lowest:
        """Of all waves but translations."""
        matrices = self.matrices(parameters, q)
        values = [self._modes(matrix, point)[0][0] for matrix, point in zip(matrices, q, strict=True)]
        k = int(np.argmin(values))
        return Lowest(float(values[k]), q[k])

    def rows(self, parameters: Array, q: Array) -> Array:
        """Curvatures of all waves with a negative one, as rows [M, P] to multiply parameters with."""
        found = []
        for matrix, point in zip(self.matrices(parameters, q), q, strict=True):
            values, vectors = self._modes(matrix, point)
            found += [self._row(vectors[:, k], point) for k in np.nonzero(values < -TOLERANCE)[0]]
        return np.array(found).reshape(-1, self.basis.n_parameters)

    def _modes(self, matrix: Waves, q: Array) -> tuple[Array, Waves]:
        """Eigenvalues, rising, and vectors; at q = 0 without the three translations."""
        if np.abs(q).max() > 1e-9:
            values, vectors = np.linalg.eigh(matrix)
            return values, vectors
        rest = self._internal
        values, vectors = np.linalg.eigh(rest.T @ matrix @ rest)
        return values, rest @ vectors

    @cached_property
    def _internal(self) -> Array:
        """Displacements of one cell [3S, 3S - 3] that don't move its mean; for one atom a cell, none: zero vectors."""
        s = len(self.basis.lattice.numbers)
        if s == 1:
            return np.zeros((3, 1))
        mean = np.full((s, 1), s**-0.5)
        _, _, right = np.linalg.svd(mean.T)
        return np.kron(right[1:].T, np.eye(3))

    def _row(self, vector: Waves, q: Array) -> Array:
        """v†Φ(q)v by parameters [P]."""
        v = vector.reshape(-1, 3)
        phase = np.exp(2j * np.pi * (self._scaled @ q))
        weights = np.real(v[self.first].conj()[:, :, None] * v[self.second][:, None, :] * phase[:, None, None])
        row: Array = np.einsum("nab,nabp->p", weights, self.constants)
        return row

    @cached_property
    def _scaled(self) -> Array:
        scaled = self.basis.lattice.scaled
        found: Array = self.offset + scaled[self.second] - scaled[self.first]
        return found

    @cached_property
    def _crystal(self) -> HarmonicCrystal:
        """Of unit masses."""
        none = np.zeros((len(self.first), 3, 3))
        masses = np.ones(len(self.basis.lattice.numbers))
        return HarmonicCrystal(self.basis.lattice, self.first, self.second, self.offset, none, masses)


def _commensurate(box: NDArray[np.int64]) -> Array:
    """Wave vectors [K, 3] in [0, 1) of a box: q with box @ q integer."""
    count = abs(round(np.linalg.det(box)))
    inverse = np.linalg.inv(box)
    reach = np.abs(box).sum(axis=1)
    integers = np.stack(np.meshgrid(*[np.arange(0, n + 1) for n in reach], indexing="ij"), axis=-1).reshape(-1, 3)
    signed = np.concatenate([integers * signs for signs in product((1, -1), repeat=3)])
    q = (signed @ inverse.T) % 1.0
    _, places = np.unique(_key(q), axis=0, return_index=True)
    found: Array = q[places]
    assert len(found) == count
    return found


def _one_of_each(q: Array) -> Array:
    """Without repetitions, and one of q and -q."""
    keys = zip(_key(q).tolist(), _key(-q).tolist(), strict=True)
    _, places = np.unique([min(one, other) for one, other in keys], axis=0, return_index=True)
    found: Array = q[places]
    return found


def _key(q: Array) -> NDArray[np.int64]:
    """The same integers for wave vectors [K, 3] that differ by reciprocal lattice vectors."""
    return np.rint(q * _RESOLUTION).astype(np.int64) % _RESOLUTION


def boxes_of(frames: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """The different ones of many boxes."""
    return [np.array(box) for box in dict.fromkeys(tuple(map(tuple, box.tolist())) for box in frames)]
