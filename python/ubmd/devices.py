"""Where torch computes: the CPU or a GPU, by the names that torch and ``pair_style ubmd`` have for them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from ubmd.errors import SettingsError
from ubmd.spelling import nearest

if TYPE_CHECKING:  # settings are read before it is needed
    import torch

CPU = "cpu"
_SPELLING = re.compile(r"cpu|cuda(:\d+)?")
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "hip": "cuda", "rocm": "cuda", "none": "cpu"}


def spelled(device: str) -> str:
    """The same name; ValueError if it is none."""
    if _SPELLING.fullmatch(device):
        return device
    meant = _MEANT.get(device.lower()) or nearest(device, (CPU, "cuda"))
    hint = f"; did you mean '{meant}'?" if meant else ""
    raise ValueError(f"a device is cpu, cuda (the first GPU) or cuda:n (GPU number n, from 0){hint}")


Device = Annotated[str, AfterValidator(spelled)]
"""the type of a setting"""


def what_is_missing(device: str) -> str:
    """Why torch cannot use a device here, and what to do, as the second half of a sentence; empty if it can."""
    if device == CPU:
        return ""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU only: use 'cpu', or install a torch with CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU: use 'cpu', or look whether nvidia-smi lists one"
    count = torch.cuda.device_count()
    if device.startswith("cuda:") and int(device[5:]) >= count:
        return f"the last GPU is cuda:{count - 1}: use 'cuda' for the first one"
    return ""


def check_device(device: str, key: str) -> None:
    """Whether torch can use a device here; ``key``: what the sentence calls it, e.g. 'training.device'.

    Raises:
        SettingsError: it is none, or it is not there.
    """
    try:
        spelled(device)
    except ValueError as error:
        raise SettingsError(f"'{key}': {error} (got {device!r}).") from None
    missing = what_is_missing(device)
    if missing:
        raise SettingsError(f"{key} = '{device}' cannot be used: {missing}.")


def usable(device: str) -> str:
    """The device, or the CPU where torch cannot use it."""
    return CPU if what_is_missing(device) else device


def torch_device(device: str) -> torch.device:
    """As torch takes it; 'cuda' is the first GPU."""
    import torch

    return torch.device("cuda:0" if device == "cuda" else device)
