"""Elastic constants from second-order force constants, by the long-wave limit of the dynamical matrix.

Born and Huang, Dynamical Theory of Crystal Lattices (Clarendon Press, 1954); see `elastic_constants`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.phonons import HarmonicCrystal

GPA = 160.21766208  # per eV/Å^3
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True)
class ElasticConstants:
    """Elastic constants at zero temperature.

    Attributes:
        matrix: C [6, 6] in Voigt's order xx, yy, zz, yz, xz, xy along the Cartesian axes of the crystal, GPa.
        misfit: largest part of the long-wave force constants that no elastic tensor explains, GPa. It differs from zero
            only where symmetry allows a stress in the ideal lattice, or the potential breaks rotational invariance.
    """

    matrix: NDArray[np.float64]
    misfit: float

    def cubic(self, tolerance: float = 1e-6) -> tuple[float, float, float] | None:
        """(C11, C12, C44) in GPa; None unless the matrix has the form of a cubic crystal along its axes."""
        c = self.matrix
        c11, c12, c44 = np.trace(c[:3, :3]) / 3, (c[0, 1] + c[0, 2] + c[1, 2]) / 3, np.trace(c[3:, 3:]) / 3
        form = np.zeros((6, 6))
        form[:3, :3] = c12
        form[np.diag_indices(6)] = [c11] * 3 + [c44] * 3
        same = np.abs(c - form).max() <= tolerance * np.abs(c).max()
        return (float(c11), float(c12), float(c44)) if same else None

    def turned(self, rotation: ArrayLike) -> ElasticConstants:
        """The constants along other axes: a rotation [3, 3] takes those axes to the Cartesian ones."""
        pairs = np.array(_VOIGT)
        place = np.zeros((3, 3), dtype=int)
        place[pairs[:, 0], pairs[:, 1]] = place[pairs[:, 1], pairs[:, 0]] = np.arange(6)
        r = np.asarray(rotation, dtype=float)
        tensor = np.einsum("ai,bj,ck,dl,ijkl->abcd", r, r, r, r, self.matrix[place[:, :, None, None], place])
        a, b = pairs.T
        return ElasticConstants(tensor[a[:, None], b[:, None], a, b], self.misfit)

    @property
    def bulk_modulus(self) -> float:
        """Pressure from all sides over the relative change of volume that it makes (Reuss's mean), GPa."""
        return float(1.0 / np.linalg.inv(self.matrix)[:3, :3].sum())

    @property
    def stable(self) -> bool:
        """Whether every small strain costs energy (Born's criterion)."""
        return bool(np.linalg.eigvalsh(self.matrix)[0] > 0.0)


def elastic_constants(basis: ClusterBasis, parameters: ArrayLike) -> ElasticConstants:
    """Elastic constants of a potential with these parameters [P].

    Born and Huang's method of long waves (Dynamical Theory of Crystal Lattices, 1954, sections 26 and 27): the force
    constants Φ(q) of a wave are expanded to second order in q, the internal motion of the sublattices is eliminated
    (they relax), and the acoustic part {ab,cd} q_c q_d, divided by the cell volume, equals that of an elastic
    continuum, C_acbd = {ab,cd} + {bc,ad} - {bd,ac}.

    Assumed: the lattice is free of stress (else the constants depend on the definition of strain) and no long-ranged
    Coulomb forces act (in piezoelectric crystals they stiffen some of them). Cutoffs of the second order limit the
    accuracy: it is a sum of force constants times distances squared.
    """
    return from_harmonic(HarmonicCrystal.from_basis(basis, parameters))


def from_harmonic(crystal: HarmonicCrystal) -> ElasticConstants:
    """Elastic constants of second-order force constants; see `elastic_constants`."""
    waves = _long_waves(crystal)
    tensor = np.einsum("abcd->acbd", waves) + np.einsum("bcad->acbd", waves) - np.einsum("bdac->acbd", waves)
    for axes in ((1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1)):
        tensor = 0.5 * (tensor + tensor.transpose(axes))
    explained = 0.5 * (np.einsum("acbd->abcd", tensor) + np.einsum("adbc->abcd", tensor))
    matrix = np.array([[tensor[(*p, *q)] for q in _VOIGT] for p in _VOIGT])
    return ElasticConstants(GPA * matrix, float(GPA * np.abs(waves - explained).max()))


def _long_waves(crystal: HarmonicCrystal) -> NDArray[np.float64]:
    """{ab,cd} [3, 3, 3, 3], symmetric in ab and in cd, eV/Å^3."""
    s = len(crystal.masses)
    vectors, constants = crystal.vectors, crystal.constants
    zeroth, first = np.zeros((s, 3, s, 3)), np.zeros((3, s, 3, s, 3))
    for i, j, vector, constant in zip(crystal.first, crystal.second, vectors, constants, strict=True):
        zeroth[i, :, j] += constant
        first[:, i, :, j] += vector[:, None, None] * constant
    second = np.einsum("nab,nc,nd->abcd", constants, vectors, vectors)
    # Forces on the sublattices when all move with the wave: relaxed by the pseudo-inverse (translations are null).
    force = first.sum(axis=3).reshape(3, 3 * s, 3)
    relaxed = np.einsum("cka,kl,dlb->abcd", force, np.linalg.pinv(zeroth.reshape(3 * s, 3 * s), 1e-10), force)
    relaxed = 0.5 * (relaxed + relaxed.transpose(0, 1, 3, 2))
    waves: NDArray[np.float64] = (-0.5 * second - relaxed) / abs(np.linalg.det(crystal.lattice.cell))
    return 0.5 * (waves + waves.transpose(1, 0, 2, 3))
