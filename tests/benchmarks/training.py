"""Time of training, through `gmnn.trainer.train`: per step, against its matrix products, and of warm starts."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from clock import now
from systems import ROOT, SYSTEMS

BATCH = 32
STIFFNESS = 2.0  # eV/Å^2, of the springs that label the structures


def labelled(name: str, count: int) -> list[Atoms]:
    """Rattled structures of a system, labelled by springs to its own positions: cheap, and smooth enough to learn."""
    rng = np.random.default_rng(3)
    start = SYSTEMS[name].make()
    structures = []
    for _ in range(count):
        atoms = start.copy()
        shift = rng.normal(0.0, 0.1, atoms.positions.shape)
        atoms.positions += shift
        energy = 0.5 * STIFFNESS * float((shift**2).sum())
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=-STIFFNESS * shift)
        structures.append(atoms)
    return structures


def plain_path() -> AbstractContextManager[object]:
    """Training inside this context uses plain torch and autograd instead of the compiled operators."""
    from ubmd.potentials.gmnn import gradient

    return patch.object(gradient, "fused_operators", lambda model: None)


def step_seconds(structures: list[Atoms], epochs: int, path: AbstractContextManager[object]) -> float:
    """Shortest mean time of a step in an epoch, s; everything included but the validation of the last epoch."""
    from ubmd.potentials.gmnn.trainer import train
    from ubmd.settings import ModelSettings, TrainingSettings

    settings = TrainingSettings(batch_size=BATCH, threads=1, validation_every=10**6, learning_rate=0.001)
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder, path:
        train(
            ModelSettings(),
            settings,
            structures,
            structures[:1],
            Path(folder),
            seed=0,
            epochs=epochs + 2,
            progress=lambda row: ends.append(now()),
        )
    return float(np.diff(ends)[:-1].min()) / -(-len(structures) // BATCH)


def time_training(name: str, count: int, epochs: int, rounds: int) -> dict[str, float]:
    """Seconds per step of both paths and of the bare products of a mini-batch, measured in turn; one thread."""
    import gemm
    import torch

    torch.set_num_threads(1)
    structures = labelled(name, count)
    n_atoms = BATCH * len(structures[0])
    products = {
        kind: gemm.training_products(n_atoms, "light", multiply) for kind, multiply in gemm.multiplications().items()
    }
    times: dict[str, list[float]] = {"torch": [], "fastest": [], "fused": [], "plain": []}
    for _ in range(rounds):
        for kind, run in products.items():
            times[kind].append(gemm.seconds(run))
        times["fused"].append(step_seconds(structures, epochs, nullcontext()))
        times["plain"].append(step_seconds(structures, 1, plain_path()))
    return {key: min(values) for key, values in times.items()}


# ------------------------------------------------------------------------------------- warm starts


def warm_start(epochs: int, seeds: int) -> dict[str, float]:
    """Time of a warm start to the accuracy of a training from scratch, over the time of that; median over seeds.

    As in the learning loop: a model of 64 structures of alanine dipeptide at 300 K (OpenMM's ff19SB), then eight new
    ones from where it has not been (600 K). Half of the 16 structures for validation are from there, too.
    """
    cold, hot = _molecular_dynamics(64 + 8, 300.0), _molecular_dynamics(8 + 8, 600.0)
    sets = (cold[8:], cold[8:] + hot[8:], cold[:8] + hot[:8])
    ratios = [_warm_ratio(*sets, epochs, seed) for seed in range(seeds)]
    return {"ratio": float(np.median(ratios)), "largest": max(ratios)}


def _molecular_dynamics(count: int, temperature: float) -> list[Atoms]:
    """Labelled frames of reference dynamics, in random order."""
    from ubmd.references import sample
    from ubmd.settings import ReferenceSettings, SamplingSettings

    folder = ROOT / "lammps_examples/alanine_dipeptide"
    arguments = {"pdb": "alanine_dipeptide.pdb", "forcefield": ["amber19/protein.ff19SB.xml"]}
    reference = ReferenceSettings(calculator="openmm", arguments=arguments)
    sampling = SamplingSettings(temperature=temperature, frames=count, stride=100, equilibration=500, trajectories=1)
    frames = sample(SYSTEMS["alanine"].make(), reference, sampling, folder)
    return [frames[k] for k in np.random.default_rng(0).permutation(len(frames))]


def _warm_ratio(old: list[Atoms], grown: list[Atoms], validation: list[Atoms], epochs: int, seed: int) -> float:
    """Of one seed: the shortest warm start that gets there counts, with the schedule of its own length."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _train(old, validation, folder / "old", epochs, seed)
        scratch = _train(grown, validation, folder / "scratch", epochs, seed + 100)
        goal, total = min(_criterion(scratch)), scratch[-1]["time"]
        for share in (40, 20, 10, 7, 5, 3, 2, 1):
            warm = _train(grown, validation, folder / f"warm{share}", max(1, epochs // share), seed, folder / "old")
            for row, criterion in zip(warm, _criterion(warm), strict=True):
                if criterion <= goal:
                    return float(row["time"] / total)
    return float("inf")


def _train(
    training: list[Atoms], validation: list[Atoms], folder: Path, epochs: int, seed: int, initial: Path | None = None
) -> list[dict[str, Any]]:
    """Rows of the log of a training, with the time so far, s; `initial` is the folder of an earlier one."""
    from ubmd.potentials.gmnn.trainer import train
    from ubmd.settings import ModelSettings, TrainingSettings

    start, rows = now(), []
    train(
        ModelSettings(),
        TrainingSettings(threads=1, checkpoint_every=10**6),
        training,
        validation,
        folder,
        seed,
        initial / "weights.pt" if initial else None,
        epochs,
        progress=lambda row: rows.append({**row, "time": now() - start}),
    )
    return rows


def _criterion(rows: list[dict[str, Any]]) -> list[float]:
    """What early stopping minimises, by epoch: energy MAE (eV/atom) + force MAE (eV/Å)."""
    return [row["valid_energy_mae_meV_per_atom"] / 1000 + row["valid_force_mae_eV_per_A"] for row in rows]
