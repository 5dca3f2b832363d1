"""A force-constant potential as files hold it: the folder of a run, or a model file."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

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
    """Read the folder of a run with force constants (basis.npz, posterior.npz), or a model file.

    Raises:
        ModelError: there is no such potential.
    """
    path = Path(path)
    if not path.is_dir():
        return _from_model(path)
    if not (path / "basis.npz").is_file() or not (path / "posterior.npz").is_file():
        if (path / "model.pt").is_file():
            return _from_model(path / "model.pt")
        raise ModelError(f"{path} holds no force-constant potential: there is no basis.npz and posterior.npz in it.")
    return Potential(ClusterBasis.load(path / "basis.npz"), Posterior.load(path / "posterior.npz").mean)


def _from_model(path: Path) -> Potential:
    """The basis is an extra file in the model file, the parameters are a buffer of it."""
    import torch

    from ubmd.crystal.export import BASIS
    from ubmd.export import load_model

    module = load_model(path)
    if json.loads(module.metadata()).get("kind") != "force constants":
        raise ModelError(
            f"{path} is no force-constant potential: give a model of a crystal, from settings with [crystal]."
        )
    found = {BASIS: ""}
    torch.jit.load(str(path), map_location="cpu", _extra_files=found)
    content: Any = found[BASIS]
    return Potential(ClusterBasis.load(BytesIO(content)), module.theta.numpy())
