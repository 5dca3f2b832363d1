"""What the stages of runs are called where people read of them: status, progress, reports and pictures.

Run folders, events and hashes keep the short names.
"""

from __future__ import annotations

STAGE_NAMES = {
    "test_set": "test set",
    "check_labels": "given labels again",
    "train": "training",
    "learn": "training",
    "export": "calibration, model file",
    "measure": "errors",
    "md": "MD",
    "move": "MD",
    "select": "selection",
    "label": "labels",
    "judge": "errors of new labels",
}
"""Short name -> name, in the order in which a run does its stages."""


def stage_name(stage: str) -> str:
    """The name of a stage; one that only other versions know is shown as it is written, without underscores."""
    return STAGE_NAMES.get(stage, stage.replace("_", " "))
