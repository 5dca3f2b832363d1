"""What worker processes do for the loop besides MD replicas: label one structure, run one reference trajectory.

The module is light: a worker that labels imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from ubmd.data.structures import read_structures, write_structures
from ubmd.settings import ReferenceSettings, SamplingSettings


def label_file(source: Path, target: Path, settings: ReferenceSettings, base: Path) -> None:
    """Label the structure in ``source`` and write it to ``target``.

    Raises:
        LabelError: the reason for a rejection.
        SettingsError: the calculator cannot be made.
    """
    from ubmd.references import label

    write_structures(target, [label(read_structures(source)[0], settings, base)])


def sample_file(
    source: Path, target: Path, reference: ReferenceSettings, sampling: SamplingSettings, base: Path, index: int
) -> None:
    """Run trajectory ``index`` of a test set from the structure in ``source``; errors as for `label_file`."""
    from ubmd.references import sample_trajectory

    write_structures(target, sample_trajectory(read_structures(source)[0], reference, sampling, base, index))
