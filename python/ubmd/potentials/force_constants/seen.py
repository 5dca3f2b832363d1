"""How far the displacements of labels reach: shortest distances, largest differences of displacements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.lattice import Supercell
from ubmd.potentials.force_constants.regression import Posterior

Array = NDArray[np.float64]


class Seen:
    """The extremes of the labels that were added.

    Attributes:
        shortest: distance of each kind of pair [T], Å, at most that of the ideal crystal; None without pair functions.
        largest: difference of displacements of each shell [K], Å, at least that of `Shells.no_labels`.
    """

    def __init__(self, basis: ClusterBasis) -> None:
        self._basis = basis
        self.shortest: Array | None = None if basis.pairs is None else basis.pairs.ideal_core()
        self.largest: Array = basis.shells.no_labels()

    def add(self, displacements: Array, box: Supercell) -> None:
        """A label's displacements [n, 3], Å."""
        basis = self._basis
        self.largest = np.maximum(self.largest, basis.shells.largest(displacements, box))
        if basis.pairs is not None and self.shortest is not None:
            self.shortest = np.minimum(self.shortest, basis.pairs.shortest(displacements, box))

    def bounded(self, posterior: Posterior, stable: bool) -> Posterior:
        """A posterior with the core of its pair functions, and the wall where crystal.stable wants one."""
        basis = self._basis
        walled = stable and basis.pairs is not None and max(basis.orders) > 2
        return replace(posterior, core=self.shortest, limits=self.largest if walled else None)
