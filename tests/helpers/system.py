"""A loop that is real in every part and small enough for tests: a Cu/Au cluster, EMT, 16 neurons, LAMMPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli_w
from ase import Atoms
from ase.cluster import Octahedron

from ubmd.data.extxyz import write_structures
from ubmd.learning import RunFolder
from ubmd.settings import RunSettings


def cluster() -> Atoms:
    """13 atoms, two of them gold."""
    atoms = Octahedron("Cu", 3, cutoff=1)
    return Atoms(["Au", "Au", *atoms.get_chemical_symbols()[2:]], atoms.positions)


def settings_table(run_dir: Path) -> dict[str, Any]:
    """Settings of a run of three iterations; one thread, so that it repeats bit for bit."""
    return {
        "run_dir": str(run_dir),
        "seed": 7,
        "start": {"file": "start.extxyz", "count": 4, "displacement": 0.1},
        "reference": {"calculator": "ase.calculators.emt:EMT", "timeout": 60.0},
        "model": {"hidden": [16, 16], "n_radial": 2},
        "training": {"epochs": 12, "checkpoint_every": 3, "threads": 1},
        "uncertainty": {"projections": 16},
        "md": {"replicas": 3, "steps": 40, "timestep": 2.0, "frames_every": 10},
        "bias": {"force": 0.5, "species": {"Au": 0.0}, "window": 4, "every": 2},
        "selection": {"batch": 2},
        "loop": {"labels": 8, "threshold": 1000.0, "warm_epochs": 6},
        "test": {"sampling": {"temperature": 600.0, "frames": 3, "stride": 3, "equilibration": 3}},
        "workers": {"processes": 2},
    }


def make_settings(run_dir: Path, **tables: dict[str, Any] | None) -> RunSettings:
    """`settings_table` with some tables updated (None: left out)."""
    values = settings_table(run_dir)
    for name, table in tables.items():
        if table is None:
            del values[name]
        else:
            values[name] = values.get(name, {}) | table
    return RunSettings.model_validate(values)


def write_inputs(folder: Path, run_dir: Path) -> Path:
    """Start structure and settings file; returns the latter."""
    write_structures(folder / "start.extxyz", [cluster()])
    (folder / "settings.toml").write_text(tomli_w.dumps(settings_table(run_dir)))
    return folder / "settings.toml"


def without_times(folder: RunFolder) -> list[dict]:
    """The history without what differs between equal runs."""
    history = folder.read_history()
    for entry in history:
        del entry["seconds"]
        for replica in entry["replicas"]:
            del replica["seconds"], replica["ms_per_step"]
    return history
