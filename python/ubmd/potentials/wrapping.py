"""An energy module of another program becomes a model file: constants, uncertainty, calibration."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase import Atoms

from ubmd.data.labels import dataset_hash
from ubmd.potentials.fitting import export_raw
from ubmd.potentials.interface import RawModule
from ubmd.potentials.raw import fitted_constants, read_raw, write_shifted
from ubmd.settings import ModelSettings, UncertaintySettings


def wrap(
    raw: RawModule,
    training: Sequence[Atoms],
    held_out: Sequence[Atoms],
    settings: UncertaintySettings,
    path: Path,
    refit: bool = True,
) -> dict[str, Any]:
    """Write the model file of a module.

    Args:
        raw: its module is a TorchScript file.
        training: labelled structures that the uncertainty is fitted to, best those that the module was trained on.
        held_out: labelled structures that it was not trained on, whose errors give the conformal factors.
        settings: of the uncertainty.
        path: of the model file.
        refit: add constants of the elements, fitted to the energies of ``training`` (of no others: what a calibration
            has seen, it would take for certain).

    Returns:
        The record; ``constants`` are those that were added, eV per atom.

    Raises:
        DataError: labels are missing, or have an element that the module does not know.
        ModelError: the module does not give what it should.
    """
    constants = fitted_constants(raw, training) if refit else {}
    provenance = {
        "training_set_hash": dataset_hash(training),
        "settings": {"uncertainty": settings.model_dump(mode="json")},
    }
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder, "module.pt")
        write_shifted(raw, constants, module)
        shifted = replace(raw, module=module, record=read_raw(module).record)
        name = raw.backend["name"]
        return export_raw(shifted, name, ModelSettings(), training, held_out, settings, path, provenance)
