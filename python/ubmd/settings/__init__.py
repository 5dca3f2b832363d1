"""Settings as tables: declared, checked, read from TOML."""

from ubmd.settings.md import BiasRampSettings, BiasSettings, MDRampSettings, MDSettings
from ubmd.settings.potentials import (
    CRYSTAL_UNCERTAINTY,
    ORDERS,
    CrystalSettings,
    ModelSettings,
    TrainingSettings,
    TrainSettings,
    UncertaintySettings,
)
from ubmd.settings.reference import USUAL_INFO, ReferenceSettings, SamplingSettings, TestSettings
from ubmd.settings.run import (
    FITTING_METHODS,
    LoopSettings,
    RunSettings,
    SelectionSettings,
    StartSettings,
    VariablesSettings,
    WorkerSettings,
)
from ubmd.settings.table import Table, load_settings, make_settings, read_tables

__all__ = [
    "CRYSTAL_UNCERTAINTY",
    "FITTING_METHODS",
    "ORDERS",
    "USUAL_INFO",
    "BiasRampSettings",
    "BiasSettings",
    "CrystalSettings",
    "LoopSettings",
    "MDRampSettings",
    "MDSettings",
    "ModelSettings",
    "ReferenceSettings",
    "RunSettings",
    "SamplingSettings",
    "SelectionSettings",
    "StartSettings",
    "Table",
    "TestSettings",
    "TrainSettings",
    "TrainingSettings",
    "UncertaintySettings",
    "VariablesSettings",
    "WorkerSettings",
    "load_settings",
    "make_settings",
    "read_tables",
]
