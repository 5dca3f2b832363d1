"""Arguments of MACE's own command, mace_run_train: those of the user as they are, and those that ubmd needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ubmd.errors import SettingsError
from ubmd.spelling import nearest

NAME = "ubmd"  # of the training, in names of its files
# argument -> the setting of ubmd that decides it
DECIDED = {
    "max_num_epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "default_dtype": "training.precision",
    "device": "training.device",
    "foundation_model": "model.checkpoint",
    "seed": "seed",
    "name": "",
    "work_dir": "",
    "log_dir": "",
    "model_dir": "",
    "checkpoints_dir": "",
    "results_dir": "",
    "train_file": "",
    "valid_file": "",
    "valid_fraction": "",
    "energy_key": "",
    "forces_key": "",
    "stress_key": "",
    "restart_latest": "",
    "config": "",
}


def check_arguments(arguments: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    """SettingsError for an argument that the command does not have, or that ubmd decides; ``known``: its arguments."""
    for name in arguments:
        if name in DECIDED:
            meant = f"set {DECIDED[name]} instead" if DECIDED[name] else "remove it"
            raise SettingsError(f"model.arguments.{name} is decided by ubmd: {meant}.")
        if name not in known:
            close = nearest(name, set(known) - set(DECIDED))
            hint = f"did you mean {close!r}?" if close else "see mace_run_train --help."
            raise SettingsError(f"model.arguments: mace_run_train has no argument {name!r}; {hint}")


def device_argument(device: str) -> str:
    """``training.device`` as the command takes it; SettingsError for a number of a GPU, which it does not know."""
    if device.startswith("cuda:"):
        raise SettingsError(
            f"training.device = '{device}': mace_run_train takes no number of a GPU; use 'cuda', and choose the GPU by "
            "the environment variable CUDA_VISIBLE_DEVICES."
        )
    return device


def command_line(arguments: Mapping[str, Any], takes_value: Mapping[str, bool]) -> list[str]:
    """Options of the command; an option without a value is there if it is true."""
    found = []
    for name, value in arguments.items():
        if takes_value.get(name, True):
            found.append(f"--{name}={value}")
        elif value:
            found.append(f"--{name}")
    return found


def training_arguments(
    given: Mapping[str, Any], files: Sequence[Path], work: Path, start: Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a training.

    Args:
        given: by the user.
        files: training and validation structures.
        work: folder of the training.
        start: checkpoint of the network to start from.
        options: seed, epochs, batch_size, default_dtype, device.
    """
    usual: dict[str, Any] = {"E0s": "average" if start is None else "foundation"}
    if start is not None:
        usual |= {"foundation_model": start, "multiheads_finetuning": False}
    return {
        **usual,
        **given,
        "name": NAME,
        "train_file": files[0],
        "valid_file": files[1],
        "work_dir": work,
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "stress_key": "REF_stress",
        "restart_latest": True,
        **options,
    }
