"""ubmd: uncertainty-biased molecular dynamics for learning uniformly accurate interatomic potentials.

Importing the package is light on purpose: LAMMPS imports it (through its plugin entry point) at every
start, so torch and ase are only loaded when a name that needs them is used (PEP 562).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Calculator": "ubmd.calculator",
    "Evaluation": "ubmd.measure.evaluation",
    "GaussianMomentNetwork": "ubmd.potentials.gmnn.model",
    "RunSettings": "ubmd.settings",
    "evaluate": "ubmd.measure.evaluation",
    "load_settings": "ubmd.settings",
}

__all__ = [
    "Calculator",
    "Evaluation",
    "GaussianMomentNetwork",
    "RunSettings",
    "__version__",
    "evaluate",
    "load_settings",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ubmd' has no attribute '{name}'")
