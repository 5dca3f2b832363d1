"""ubmd: uncertainty-biased molecular dynamics for learning uniformly accurate interatomic potentials.

>>> import ubmd
>>> run = ubmd.run(settings, calculator, structures)    # label, train, explore with biased MD in LAMMPS, repeat
>>> model = ubmd.train(frames)                          # a model of labels that exist already
>>> predictions = ubmd.evaluate(run.model, frames)      # energies, forces, stresses, uncertainties, in batches
>>> atoms.calc = ubmd.Calculator(run.model)             # a model as an ASE calculator
>>> run = ubmd.Run("copper_run")                        # the folder of a run: its labels, history, events, report

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
    "Model": "ubmd.calculator",
    "Prediction": "ubmd.potentials.interface",
    "Run": "ubmd.runs.run",
    "RunSettings": "ubmd.settings",
    "Trajectory": "ubmd.api.md",
    "biased_md": "ubmd.api.md",
    "errors": "ubmd.errors",
    "evaluate": "ubmd.measure.evaluation",
    "events": "ubmd.runs.event_records",
    "load_settings": "ubmd.settings",
    "run": "ubmd.api.running",
    "train": "ubmd.api.training",
}
_MODULES = ("errors", "events")  # names of modules as a whole

__all__ = [
    "Calculator",
    "Evaluation",
    "GaussianMomentNetwork",
    "Model",
    "Prediction",
    "Run",
    "RunSettings",
    "Trajectory",
    "__version__",
    "biased_md",
    "errors",
    "evaluate",
    "events",
    "load_settings",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ubmd' has no attribute '{name}'")
    module = import_module(_EXPORTS[name])
    return module if name in _MODULES else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
