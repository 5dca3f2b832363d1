"""Training of a Gaussian-moment network: Adam on the summed loss, early stopping, exact resume.

Zaverkin et al., npj Comput. Mater. 10, 83 (2024): four learning rates that decay linearly to zero, mini-batches,
and the weights with the smallest validation energy MAE + force MAE are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ase.data
import numpy as np
import torch
from ase import Atoms

from ubmd.data.graph import Batch, Graph, build_graph, chunks
from ubmd.data.labels import check_labelled, dataset_hash
from ubmd.devices import check_device, torch_device
from ubmd.errors import DataError, ModelError, TrainingError
from ubmd.files import file_hash
from ubmd.potentials.gmnn import checkpoint
from ubmd.potentials.gmnn.gradient import chunk_limits, loss_and_gradients, prediction_errors
from ubmd.potentials.gmnn.loss import ErrorSums
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.history import SECONDS_BETWEEN_PICTURES, Log, Row, draw
from ubmd.process import torch_threads
from ubmd.settings import ModelSettings, TrainingSettings
from ubmd.settings.marks import key_values

_EPOCHS = "training.epochs"  # in the identity of a training


@dataclass(frozen=True)
class TrainedModel:
    """Result of a training: the model with its best weights, one row per epoch, and the row of the best epoch."""

    model: GaussianMomentNetwork
    history: list[Row]
    best: Row


def train(
    model_settings: ModelSettings,
    training_settings: TrainingSettings,
    training: Sequence[Atoms],
    validation: Sequence[Atoms],
    folder: Path,
    seed: int,
    initial: Path | None = None,
    epochs: int | None = None,
    progress: Callable[[Row], None] | None = None,
    fresh: bool = False,
    prolong: bool = False,
) -> TrainedModel:
    """Train a model, or resume (or just return) the training that ``folder/checkpoint.pt`` belongs to.

    Writes ``log.csv``, ``learning_curve.png``, ``checkpoint.pt`` and, at the end, ``weights.pt`` (best weights).
    A training that was killed and resumed ends with the same bits as an uninterrupted one (with one thread, on the
    same device).

    Args:
        training, validation: labelled structures (energy and forces; stress where there is one), without the baseline
            of the settings (see `ubmd.potentials.members.train_network`).
        folder: made if missing.
        seed: of the initial weights and the order of the mini-batches.
        initial: weights file of an earlier model to start from; c, sigma and mu are taken from there, the weights as
            `_shrink_and_perturb` says; Adam is restarted with all learning rates times ``warm_learning_rate_factor``.
        epochs: instead of ``training_settings.epochs``.
        progress: called after every epoch with the row of the log (see `history.COLUMNS`) and ``epochs``.
        fresh: start again even if there is a checkpoint.
        prolong: continue a training that had fewer epochs (`prolongation`), and keep what is needed to do so again.

    Raises:
        SettingsError: torch has no such device. DataError: unusable structures. ModelError: ``initial`` does not fit.
        TrainingError: the checkpoint belongs to another training, or the loss is not finite.
    """
    check_device(training_settings.device, "training.device")
    check_labelled(training, "training set")
    check_labelled(validation, "validation set")
    epochs = epochs or training_settings.epochs
    folder.mkdir(parents=True, exist_ok=True)
    keep = training_settings.warm_keep
    model = _initial_model(model_settings, [*training, *validation], seed, initial, keep)
    identity = _identity(model, training_settings, training, validation, seed, initial, epochs)
    path = folder / "checkpoint.pt"
    if fresh:
        path.unlink(missing_ok=True)
    saved = checkpoint.load(path, "checkpoint") if path.exists() else None
    if saved is not None:
        longer = prolong and epochs > _epochs(saved)
        _check_identity(saved["identity"], identity | ({_EPOCHS: saved["identity"][_EPOCHS]} if longer else {}), path)
        if saved["finished"] and not longer:
            result = _result(saved["best"], saved["history"])
            if not (folder / "weights.pt").exists():
                checkpoint.save_weights(result.model, folder / "weights.pt")
            return result
    with torch_threads(training_settings.threads):
        trainer = _Trainer(model, training_settings, training, validation, epochs, seed, initial is not None)
        if saved is not None:
            trainer.load_state(saved)
        return _run(trainer, identity, folder, progress, prolong)


def prolongation(folder: Path, epochs: int) -> str:
    """How `train` continues the training in this folder with so many epochs; empty if it has no fewer, or is not there.

    Raises:
        ModelError: its checkpoint is damaged.
    """
    path = folder / "checkpoint.pt"
    saved = checkpoint.load(path, "checkpoint") if path.exists() else None
    if saved is None or epochs <= _epochs(saved):
        return ""
    done = len(saved["history"])
    if "optimiser" in saved:
        return f"Continues after epoch {done} of {_epochs(saved)}, with the optimiser as it was, to epoch {epochs}."
    return (
        f"Continues after epoch {done} from the best weights, to epoch {epochs}; the optimiser starts anew: the "
        "finished training has not kept its state."
    )


def _epochs(saved: dict[str, Any]) -> int:
    """Epochs that the training of a checkpoint was to have."""
    return int(saved["identity"][_EPOCHS])


# ------------------------------------------------------------------------------------------- the loop


def _run(
    trainer: _Trainer,
    identity: dict[str, Any],
    folder: Path,
    progress: Callable[[Row], None] | None,
    keep_state: bool,
) -> TrainedModel:
    """Epochs until the end, with log, picture and checkpoints."""
    log = Log(folder / "log.csv", trainer.history)
    last_picture = time.monotonic()
    try:
        while trainer.epoch < trainer.epochs:
            row = trainer.run_epoch()
            log.add(row)
            if progress is not None:
                progress({**row, "epochs": trainer.epochs})
            if trainer.epoch % trainer.settings.checkpoint_every == 0 and trainer.epoch < trainer.epochs:
                checkpoint.save_atomically({**_header(identity, False), **trainer.state()}, folder / "checkpoint.pt")
            if time.monotonic() - last_picture > SECONDS_BETWEEN_PICTURES and trainer.epoch < trainer.epochs:
                draw(trainer.history, folder / "learning_curve.png")
                last_picture = time.monotonic()
    finally:
        log.close()
    draw(trainer.history, folder / "learning_curve.png")
    assert trainer.best is not None
    result = _result(trainer.best, trainer.history)
    checkpoint.save_weights(result.model, folder / "weights.pt")
    # Last. Without optimiser state, unless it may be prolonged: from now on this training is only read.
    state = trainer.state() if keep_state else {"best": trainer.best, "history": trainer.history}
    checkpoint.save_atomically({**_header(identity, True), **state}, folder / "checkpoint.pt")
    return result


def _header(identity: dict[str, Any], finished: bool) -> dict[str, Any]:
    return {"format": checkpoint.FORMAT, "kind": "checkpoint", "identity": identity, "finished": finished}


def _result(best: dict[str, Any], history: list[Row]) -> TrainedModel:
    return TrainedModel(checkpoint.restore_model(best), history, history[best["epoch"] - 1])


class _Trainer:
    """Model, optimiser, schedule, batches and random numbers; ``state`` and ``load_state`` cover all that changes."""

    def __init__(
        self,
        model: GaussianMomentNetwork,
        settings: TrainingSettings,
        training: Sequence[Atoms],
        validation: Sequence[Atoms],
        epochs: int,
        seed: int,
        warm: bool,
    ) -> None:
        self.model = model.to_network_dtype(getattr(torch, settings.precision))
        self.device = torch_device(settings.device)
        model.to(self.device)
        self.settings = settings
        self.epochs = epochs
        self.graphs = [self._graph(atoms) for atoms in training]
        self.limits = chunk_limits(model)
        self.validation = list(chunks((self._graph(atoms) for atoms in validation), *self.limits, self.device))
        if not warm:
            model.initialise_energies(self.graphs)
        self.base_rates = _learning_rates(settings, settings.warm_learning_rate_factor if warm else 1.0)
        if model.centred:
            self.base_rates["shift"] = 0.0
        groups = _parameter_groups(model)
        self.optimiser = torch.optim.Adam(
            [{"params": groups[name], "lr": rate} for name, rate in self.base_rates.items()],
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
        )
        self.generator = torch.Generator().manual_seed(_shuffle_seed(seed))
        self.epoch = 0
        self.history: list[Row] = []
        self.best: dict[str, Any] | None = None
        # one mini-batch per epoch: always the same one, whatever the order
        self.whole = list(chunks(self.graphs, *self.limits, self.device)) if self.steps_per_epoch == 1 else None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.graphs) / self.settings.batch_size)

    def run_epoch(self) -> Row:
        """One pass over the training set, and a validation if it is due; returns the row of the log."""
        start = time.perf_counter()
        total, sums = 0.0, ErrorSums()
        order = torch.randperm(len(self.graphs), generator=self.generator).tolist()
        for step in range(self.steps_per_epoch):
            chosen = order[step * self.settings.batch_size : (step + 1) * self.settings.batch_size]
            batches = self.whole or chunks((self.graphs[k] for k in chosen), *self.limits, self.device)
            total += self._step(batches, self.epoch * self.steps_per_epoch + step, sums)
        self.epoch += 1
        row: Row = {"epoch": self.epoch, "loss": total, **sums.columns("train"), "best": 0}
        if self.epoch % self.settings.validation_every == 0 or self.epoch == self.epochs:
            row.update(self._validate())
        row["seconds"] = time.perf_counter() - start
        self.history.append(row)
        return row

    def _step(self, batches: Iterable[Batch], step: int, sums: ErrorSums) -> float:
        """One Adam step with the learning rates of this step; returns the loss before it and adds to the errors.

        The loss is a sum, so a mini-batch may come in several batches, which bounds the memory.
        """
        decay = 1.0 - step / (self.epochs * self.steps_per_epoch)
        for group, rate in zip(self.optimiser.param_groups, self.base_rates.values(), strict=True):
            group["lr"] = rate * decay
        self.optimiser.zero_grad(set_to_none=False)
        total = 0.0
        for batch in batches:
            errors, loss = loss_and_gradients(self.model, batch, self.settings)
            total += loss
            sums.add(batch, errors)
        if not math.isfinite(total):
            raise TrainingError(
                f"The loss is not finite in epoch {self.epoch + 1}: lower training.learning_rate (now "
                f"{self.settings.learning_rate:g}), and look for outliers among the labels in the table of the data."
            )
        self.optimiser.step()
        return total

    def _validate(self) -> Row:
        """Validation errors; keeps a copy of the weights if they are the best so far."""
        sums = ErrorSums()
        for batch in self.validation:
            sums.add(batch, prediction_errors(self.model, batch))
        criterion = sums.criterion()
        if not math.isfinite(criterion):
            raise TrainingError(
                f"The validation errors are not finite in epoch {self.epoch}: lower training.learning_rate "
                f"(now {self.settings.learning_rate:g})."
            )
        is_best = self.best is None or criterion < self.best["criterion"]
        if is_best:
            self.best = {"criterion": criterion, "epoch": self.epoch, **checkpoint.model_state(self.model)}
        energy = sums.mae("energy")
        return {
            **sums.columns("valid"),
            "valid_energy_mae_meV_per_atom": None if energy is None else 1000 * energy,
            "valid_force_mae_eV_per_A": sums.mae("force"),
            "best": int(is_best),
        }

    def _graph(self, atoms: Atoms) -> Graph:
        graph = build_graph(atoms, self.model.elements, self.model.cutoff)
        return replace(graph, fixed=None) if self.settings.fixed_forces else graph

    def state(self) -> dict[str, Any]:
        """All that changes during training, between two epochs."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "best": self.best,
            "history": self.history,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`; of a finished training that has not kept it, the best weights and the history."""
        self.best = state["best"]
        self.history = state["history"]
        if "optimiser" not in state:
            self.epoch = len(self.history)
            self.model.load_state_dict(state["best"]["model"])
            return
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])


def _shuffle_seed(seed: int) -> int:
    """A seed for the order of mini-batches that is unrelated to the one of the initial weights."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def _parameter_groups(model: GaussianMomentNetwork) -> dict[str, list[torch.nn.Parameter]]:
    return {
        "layers": [*model.weights, *model.biases],
        "radial": [model.radial],
        "shift": [model.shift],
        "scale": [model.scale],
    }


def _learning_rates(settings: TrainingSettings, factor: float) -> dict[str, float]:
    """Learning rates before decay, in the order of `_parameter_groups`."""
    return {
        "layers": factor * settings.learning_rate,
        "radial": factor * settings.learning_rate_radial,
        "shift": factor * settings.learning_rate_shift,
        "scale": factor * settings.learning_rate_scale,
    }


# ------------------------------------------------------------------------------- start and identity


def _initial_model(
    settings: ModelSettings, structures: Sequence[Atoms], seed: int, initial: Path | None, keep: float
) -> GaussianMomentNetwork:
    """A new model, or the earlier one if it fits settings and data, partly forgotten."""
    found = {symbol for atoms in structures for symbol in atoms.symbols}
    model = checkpoint.load_weights(initial) if initial is not None else None
    elements = settings.elements or (model and model.elements) or sorted(found, key=ase.data.chemical_symbols.index)
    missing = sorted(found - set(elements))
    if missing and model is not None and settings.elements is None:
        raise ModelError(f"{initial} does not contain the element {missing[0]} of the new data; train from scratch.")
    if missing:
        raise DataError(f"The data contain {missing[0]}, which is not in model.elements; add it there.")
    new = GaussianMomentNetwork(elements, settings, seed)
    if model is None:
        return new
    old_config, new_config = _flat(model.config()), _flat(new.config())
    for key in sorted({*old_config, *new_config}):  # a baseline that is not set is in neither
        if key != "settings.elements" and old_config.get(key) != new_config.get(key):
            raise ModelError(
                f"{initial} has {key.removeprefix('settings.')} = {old_config.get(key)}, the settings have "
                f"{new_config.get(key)}; train from scratch, or use the old settings."
            )
    _shrink_and_perturb(model, GaussianMomentNetwork(model.elements, settings, seed), keep)
    return model


def _shrink_and_perturb(model: GaussianMomentNetwork, fresh: GaussianMomentNetwork, keep: float) -> None:
    """Replace W and B by keep·old + sqrt(1 - keep^2)·fresh, which keeps their variance; biases stay.

    Weights fitted to few data generalise worse after further training than new ones; partly forgetting them cures that
    (Ash & Adams, NeurIPS 2020, "On warm-starting neural network training"). Seen on alanine dipeptide, 200 epochs per
    8 new labels: keep = 0.6 has a quarter smaller force errors up to 32 labels, keep = 1 smaller ones from 48 on.
    """
    with torch.no_grad():
        for old, new in zip([*model.weights, model.radial], [*fresh.weights, fresh.radial], strict=True):
            old.copy_(keep * old + math.sqrt(1.0 - keep**2) * new.to(old.dtype))


def _identity(
    model: GaussianMomentNetwork,
    settings: TrainingSettings,
    training: Sequence[Atoms],
    validation: Sequence[Atoms],
    seed: int,
    initial: Path | None,
    epochs: int,
) -> dict[str, Any]:
    """Everything that the result depends on, as text by name."""
    options = settings.model_dump(include=set(key_values(settings)))
    values = {
        "model": _flat(model.config()),
        "training": {**options, "epochs": epochs},
        "seed": seed,
        "the training set": dataset_hash(training),
        "the validation set": dataset_hash(validation),
        "the initial weights": file_hash(initial) if initial is not None else "none",
    }
    return {key: str(value) for key, value in _flat(values).items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys; sequences become lists, so that equal ones compare equal."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _check_identity(saved: dict[str, str], now: dict[str, str], path: Path) -> None:
    """Refuse a checkpoint of another training.

    Raises:
        TrainingError: names the first difference.
    """
    for key in sorted(now):
        if saved.get(key) != now[key]:
            change = f"{key} has changed" if key.startswith("the ") else f"{key} was {saved.get(key)}, now {now[key]}"
            raise TrainingError(
                f"{path} belongs to another training ({change}); start again with --fresh, or use another folder."
            )
