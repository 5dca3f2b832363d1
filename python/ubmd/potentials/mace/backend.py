"""MACE as a back end: trained by its own command in its own Python, converted to TorchScript there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ubmd.errors import ModelError, SettingsError
from ubmd.files import content_hash, copy_file, file_hash, is_sealed, read_json_if_whole, seal, write_json
from ubmd.potentials.interface import Labels, RawModule, Report, Summary, TrainingTable
from ubmd.potentials.mace.arguments import NAME, check_arguments, command_line, device_argument, training_arguments
from ubmd.potentials.mace.environment import Environment
from ubmd.potentials.mace.log import LOGS, Progress, remove_logs, summary
from ubmd.settings import ModelSettings, UncertaintySettings

if TYPE_CHECKING:  # settings are looked at before it is needed
    from ase import Atoms

_WORK = "mace"  # folder of a training, inside ours
# Part of a file's name -> licence of the network, where its authors publish it under that name.
_LICENCES = {
    "mace-off": "academic only (ASL)",
    "mace_off": "academic only (ASL)",
    "mace-omat": "academic only (ASL)",
    "mace-matpes": "academic only (ASL)",
    "mace-omol": "academic only (ASL)",
    "mace-mh": "academic only (ASL)",
    "mace-mpa": "MIT",
    "mace-mp": "MIT",
    "2023-12-03-mace": "MIT",
    "2023-12-10-mace": "MIT",
}


class Mace:
    """See `ubmd.potentials.interface.Backend`."""

    name = "mace"
    checkpoint = "mace.model"
    uncertainties = ("posterior", "distance")
    logs = LOGS

    def __init__(self) -> None:
        self.model = ModelSettings(kind="mace")
        self.source: Path | None = None
        self.environment = Environment(Path("python"))

    def configure(self, model: ModelSettings, base: Path) -> None:
        """See `ubmd.potentials.interface.Configured`."""
        if model.python is None:
            raise SettingsError(
                "model.kind = 'mace' needs model.python, an interpreter that has the package mace, e.g. "
                "'mace-env/bin/python' after: python -m venv mace-env && mace-env/bin/pip install mace-torch."
            )
        python = (base / model.python).absolute()  # links stay: a virtual environment's Python is one
        if not python.is_file():
            raise SettingsError(f"model.python: there is no file {python}.")
        self.model, self.environment = model, Environment(python)
        self.source = None if model.checkpoint is None else (base / model.checkpoint).absolute()
        if self.source is not None and not self.source.is_file():
            raise SettingsError(f"model.checkpoint: there is no file {self.source}.")

    def check(self) -> None:
        """See `ubmd.potentials.interface.Configured`."""
        check_arguments(self.model.arguments, _takes_value(self.environment))

    def check_device(self, device: str) -> None:
        """See `ubmd.potentials.interface.TrainsElsewhere`."""
        if device_argument(device) == "cpu":
            return
        found = _versions(self.environment)
        if not found["gpus"]:
            raise SettingsError(
                f"training.device = '{device}' cannot be used: torch {found['versions']['torch']} of "
                f"{self.environment.python} finds no GPU; use 'cpu', or install a torch with CUDA there."
            )

    def files(self) -> Sequence[Path]:
        """The checkpoint to start from."""
        return [] if self.source is None else [self.source]

    # ---------------------------------------------------------------------------------------------- training

    def train(
        self, labels: Labels, table: TrainingTable, folder: Path, start: Path | None, seed: int, report: Report | None
    ) -> Path:
        """mace_run_train, which resumes; then constants of the elements, fitted to the training labels."""
        from ubmd.data.labels import dataset_hash

        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target, mode = folder / self.checkpoint, table.training.mode or "fine-tune"
        source = start or self.source if mode == "fine-tune" else self.source or start
        content = [dataset_hash(labels.training), dataset_hash(labels.validation), self.model.arguments, seed, mode]
        content += [table.training.batch_size, table.training.precision, source and file_hash(source)]
        key = content_hash([content, table.epochs or table.training.epochs])
        if not table.fresh and is_sealed(target, key):
            return target
        work = _work_folder(folder, content_hash(content), table.fresh)
        if mode == "fine-tune":
            begin = source if source is None or source == start else self._fitted(source, labels.training, work)
            trained = self._run(labels, table, work, begin, seed, report)
        else:
            assert source is not None
            trained = source
        if mode == "none":
            copy_file(trained, target)
        else:
            copy_file(self._fitted(trained, labels.training, work), target)
        seal(target, key)
        if not table.prolong:
            _forget(work)
        return target

    def adapt(self, source: Path, labels: Sequence[Atoms], targets: Sequence[Path]) -> dict[str, float]:
        """See `ubmd.potentials.interface.Adapts`; of a model file, the checkpoint beside it is what is meant."""
        beside = source.with_name(self.checkpoint)
        source = beside if source.name == "model.pt" and beside.is_file() else source
        constants = self._constants(source, labels, targets[0].parent)
        for target in targets:
            self.environment.ask("shift", checkpoint=str(source), constants=constants, target=str(target.absolute()))
        return constants

    def summary(self, folder: Path) -> Summary | None:
        """From log.csv, which `Progress` has made of MACE's own log."""
        return summary(folder)

    def _run(
        self, labels: Labels, table: TrainingTable, work: Path, start: Path | None, seed: int, report: Report | None
    ) -> Path:
        """The training itself; returns MACE's own file of the network with the lowest validation loss."""
        files = work / "training.xyz", work / "validation.xyz"
        for file, structures in zip(files, (labels.training, labels.validation), strict=True):
            _write_labels(file, structures)
        epochs = table.epochs or table.training.epochs
        options = {
            "seed": seed,
            "max_num_epochs": epochs,
            # an incomplete batch is left out, also if it is the only one
            "batch_size": min(table.training.batch_size, len(labels.training)),
            "default_dtype": table.training.precision,
            "device": device_argument(table.training.device),
        }
        arguments = training_arguments(self.model.arguments, files, work, start, options)
        progress = Progress(work, f"{NAME}_run-{seed}", epochs, work.parent, report)
        line = command_line(arguments, _takes_value(self.environment))
        self.environment.train(line, table.training.threads or 1, work, progress)
        progress.finish()
        found = [work / f"{NAME}{part}.model" for part in ("_stagetwo", "")]
        return next(path for path in found if path.is_file())

    def _fitted(self, checkpoint: Path, labels: Sequence[Atoms], work: Path) -> Path:
        """A checkpoint whose constants of the elements fit labels, in the folder of the training."""
        target = work / f"fitted-{checkpoint.stem}.model"
        self.adapt(checkpoint, labels, [target])
        return target

    def _constants(self, checkpoint: Path, labels: Sequence[Atoms], folder: Path) -> dict[str, float]:
        from ubmd.potentials.raw import fitted_constants

        raw = self.convert(checkpoint, UncertaintySettings(projections=1), folder / "energies.pt")
        return fitted_constants(raw, labels)

    # ---------------------------------------------------------------------------------------------- module

    def raw_module(self, checkpoints: Sequence[Path], features: UncertaintySettings) -> RawModule:
        """The module of a checkpoint, as a TorchScript file beside it."""
        (path,) = checkpoints
        return self.convert(path, features, path.with_name("module.pt"))

    def convert(self, checkpoint: Path, features: UncertaintySettings, target: Path) -> RawModule:
        """Write the module of a checkpoint of MACE.

        Args:
            checkpoint: MACE's own file of a network, ``NAME.model``; loading it runs code in it, in model.python.
            features: projections and seed count for ``model.features = "readout"``.
            target: TorchScript file that needs neither mace nor e3nn.

        Raises:
            SettingsError: model.python does not run, or lacks a package.
            ModelError: the checkpoint has parts that the module cannot have.
        """
        from ubmd.potentials.raw import read_raw

        _check_checkpoint(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        answer = self.environment.ask(
            "convert",
            checkpoint=str(checkpoint.absolute()),
            module=str(target.absolute()),
            features=self.model.features,
            projections=features.projections,
            seed=features.seed,
        )
        raw = read_raw(target)
        origin = {"name": self.name, "version": answer["version"], "checkpoint": file_hash(checkpoint)}
        licences = [licence for part, licence in _LICENCES.items() if part in checkpoint.name.lower()]
        return replace(
            raw,
            backend=origin | ({"licence": licences[0]} if licences else {}),
            record={"features": self.model.features},
        )


@lru_cache
def _versions(environment: Environment) -> Mapping[str, Any]:
    """What `inside.versions` says."""
    return environment.ask("versions")


def _takes_value(environment: Environment) -> Mapping[str, bool]:
    """The arguments of mace_run_train, and whether each takes a value."""
    found: dict[str, bool] = _versions(environment)["arguments"]
    return found


def _work_folder(folder: Path, key: str, fresh: bool) -> Path:
    """The folder of a training; what another one has left in it is removed."""
    work = folder / _WORK
    if work.exists() and (fresh or read_json_if_whole(work / "key.json") != key):
        shutil.rmtree(work)
        remove_logs(folder)
    work.mkdir(exist_ok=True)
    write_json(work / "key.json", key)
    return work


def _forget(work: Path) -> None:
    """Remove what only a training that continues needs: networks, states, copies of the labels. Logs stay."""
    for path in [*work.glob("checkpoints/*"), *work.glob("*.model"), *work.glob("*.xyz"), work / "energies.pt"]:
        path.unlink(missing_ok=True)


def _check_checkpoint(path: Path) -> None:
    """ModelError for a file that is none of MACE's."""
    from ubmd.potentials.raw import is_torchscript

    if not path.is_file():
        raise ModelError(f"There is no file {path}.")
    if is_torchscript(path):
        raise ModelError(
            f"{path} is TorchScript (a model file of ubmd, or a compiled network), not a checkpoint of MACE; give the "
            "file NAME.model that mace_run_train has written, or mace.model of a training of ubmd."
        )


def _write_labels(path: Path, structures: Sequence[Atoms]) -> None:
    """Structures with labels under the names that MACE expects."""
    from ase import Atoms
    from ase.stress import voigt_6_to_full_3x3_stress

    from ubmd.data.extxyz import write_structures

    found = []
    for atoms in structures:
        bare = Atoms(atoms.symbols, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        results = atoms.calc.results
        if "energy" in results:
            bare.info["REF_energy"] = float(results["energy"])
        if "forces" in results:
            bare.arrays["REF_forces"] = results["forces"]
        if "stress" in results:
            bare.info["REF_stress"] = voigt_6_to_full_3x3_stress(results["stress"]).flatten().tolist()
        found.append(bare)
    write_structures(path, found)
