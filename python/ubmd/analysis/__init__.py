"""What a run has learnt and explored: torsions, coverage, calibration, pictures, report."""

from ubmd.analysis.compare import compare
from ubmd.analysis.coverage import coverage, coverage_growth
from ubmd.analysis.errors import CalibrationData, calibration_data, error_summary
from ubmd.analysis.figures import (
    calibration_figure,
    coverage_figure,
    learning_curve_figure,
    ramachandran_figure,
    uncertainty_figure,
    volume_figure,
)
from ubmd.analysis.isomers import amide_torsions, count_cis, isomers
from ubmd.analysis.report import make_report
from ubmd.analysis.run_data import Frames, read_frames
from ubmd.analysis.torsions import torsions

__all__ = [
    "CalibrationData",
    "Frames",
    "amide_torsions",
    "calibration_data",
    "calibration_figure",
    "compare",
    "count_cis",
    "coverage",
    "coverage_figure",
    "coverage_growth",
    "error_summary",
    "isomers",
    "learning_curve_figure",
    "make_report",
    "ramachandran_figure",
    "read_frames",
    "torsions",
    "uncertainty_figure",
    "volume_figure",
]
