"""Figures, tables and reports of runs; the functions of `ubmd.measure` are here too, under their old names.

The names are loaded when they are used (PEP 562): figures load matplotlib.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "CalibrationData": "ubmd.measure.errors",
    "Frames": "ubmd.analysis.run_data",
    "amide_torsions": "ubmd.measure.isomers",
    "calibration_data": "ubmd.measure.errors",
    "calibration_figure": "ubmd.analysis.figures",
    "count_cis": "ubmd.measure.isomers",
    "coverage": "ubmd.measure.coverage",
    "coverage_figure": "ubmd.analysis.figures",
    "coverage_growth": "ubmd.measure.coverage",
    "error_summary": "ubmd.measure.errors",
    "isomers": "ubmd.measure.isomers",
    "learning_curve_figure": "ubmd.analysis.figures",
    "make_report": "ubmd.analysis.report",
    "ramachandran_figure": "ubmd.analysis.figures",
    "read_frames": "ubmd.analysis.run_data",
    "torsions": "ubmd.measure.torsions",
    "uncertainty_figure": "ubmd.analysis.figures",
    "volume_figure": "ubmd.analysis.figures",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ubmd.analysis' has no attribute '{name}'")
