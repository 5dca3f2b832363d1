"""A dynamic run that is real in every part and small enough for tests: 8 silicon atoms, Stillinger-Weber, LAMMPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
from ase.build import bulk

from ubmd.data.extxyz import write_structures
from ubmd.settings.dynamic import DynamicRunSettings


def settings_table(run_dir: Path) -> dict[str, Any]:
    """Settings of a run of a few rounds with two trajectories."""
    return {
        "run_dir": str(run_dir),
        "seed": 5,
        "crystal": {"structure": "silicon.extxyz", "cutoffs": {"2": 4.0, "3": 2.6}},
        "start": {"count": 1},
        "reference": {
            "calculator": "lammps",
            "arguments": {"elements": ["Si"], "commands": ["pair_style sw", "pair_coeff * * Si.sw Si"]},
            "noise": 0.01,
        },
        "dynamic": {
            "temperatures": [300.0, 900.0],
            "steps": 90,
            "timestep": 2.0,
            "check_every": 2,
            "segment": 30,
            "labels": 7,
            "frames": 4,
            "trigger": {"maximum": 0.02, "factor": 1.3, "wait": 3, "floor": 0.0},
            "convergence": {"stop": False},
        },
        "test": {"sampling": {"temperature": 600.0, "frames": 3, "stride": 5, "equilibration": 5, "trajectories": 1}},
        "workers": {"processes": 1},
    }


def make_settings(run_dir: Path, **tables: Any) -> DynamicRunSettings:
    """`settings_table` with some tables updated (None: left out)."""
    values = settings_table(run_dir)
    for name, table in tables.items():
        if table is None:
            del values[name]
        else:
            values[name] = values.get(name, {}) | table if isinstance(table, dict) else table
    return DynamicRunSettings.model_validate(values)


def write_inputs(folder: Path, run_dir: Path) -> Path:
    """Crystal and settings file; returns the latter."""
    write_structures(folder / "silicon.extxyz", [bulk("Si", a=5.431, cubic=True)])
    (folder / "settings.toml").write_text(tomli_w.dumps(settings_table(run_dir)))
    return folder / "settings.toml"
