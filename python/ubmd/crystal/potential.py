"""A force-constant potential as files hold it: the folder of a run, or a model file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ubmd.crystal.basis import ClusterBasis
from ubmd.crystal.regression import Posterior
from ubmd.errors import ModelError


class Potential(NamedTuple):
    """Cluster basis and parameters [P] (eV/Å^order)."""

    basis: ClusterBasis
    parameters: NDArray[np.float64]


def load_potential(path: Path) -> Potential:
    """Read the folder of a run with force constants (basis.npz, posterior.npz), or a model file of such a run.

    Raises:
        ModelError: there is no such potential.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    files = [folder / name for name in ("basis.npz", "posterior.npz")]
    if path.is_dir() and not all(file.is_file() for file in files):
        raise ModelError(f"{path} holds no force-constant potential: there is no basis.npz and posterior.npz in it.")
    return Potential(ClusterBasis.load(files[0]), Posterior.load(files[1]).mean)
