"""Make the model of this example from scratch: python make_model.py

Writes, in the current folder:
  copper_run/dataset.extxyz   60 frames of perfect, hot copper crystals (32 atoms), labelled by ASE's EMT potential
  copper_run/model.pt         a small model trained on them, with calibrated uncertainties (and log and picture)
  copper.data                 the perfect crystal as a LAMMPS data file

EMT stands in for the quantum chemistry of a real project; it labels and trains in seconds.
"""

from __future__ import annotations

from pathlib import Path

from ase import Atoms
from ase.build import bulk
from ase.io import write

from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.split import split
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.trainer import train
from ubmd.references import sample
from ubmd.settings import ModelSettings, ReferenceSettings, SamplingSettings, TrainingSettings, UncertaintySettings

FOLDER = Path("copper_run")
REFERENCE = ReferenceSettings(calculator="ase.calculators.emt:EMT")
SAMPLING = SamplingSettings(temperature=600.0, frames=20, stride=20, equilibration=100, timestep=4.0, trajectories=1)
STRAINS = (-0.015, 0.0, 0.02)  # of the lattice constant, so that the model knows pressures, too
MODEL = ModelSettings(hidden=(32, 32), cutoff=4.5)
TRAINING = TrainingSettings(epochs=150, batch_size=8, threads=1)
UNCERTAINTY = UncertaintySettings(projections=128)


def crystal() -> Atoms:
    """32 atoms of copper at EMT's lattice constant."""
    return bulk("Cu", "fcc", a=3.59, cubic=True).repeat(2)


def hot_frames() -> list[Atoms]:
    """Labelled frames of MD at 600 K in cells of three sizes."""
    frames = []
    for strain in STRAINS:
        atoms = crystal()
        atoms.set_cell(atoms.cell * (1 + strain), scale_atoms=True)
        frames += sample(atoms, REFERENCE, SAMPLING, Path())
    return frames


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    write("copper.data", crystal(), format="lammps-data", masses=True, specorder=["Cu"])
    frames = hot_frames()
    write_structures(FOLDER / "dataset.extxyz", frames)
    training, calibration = split(frames, share=0.2, seed=0)
    result = train(MODEL, TRAINING, training, calibration, FOLDER, seed=0, fresh=True)
    provenance = {"training_set_hash": dataset_hash(training)}
    export_model(result.model, training, calibration, UNCERTAINTY, FOLDER / "model.pt", provenance)
    print(f"force RMSE on the calibration set: {result.best['valid_force_rmse_eV_per_A']:.4f} eV/Å")


if __name__ == "__main__":
    main()
