"""Files of a training: weights (the result) and checkpoints (to resume exactly), both written atomically.

They hold tensors, numbers and text only, so that they are read with ``weights_only=True`` (no code runs). The tensors
are on the CPU, whatever device trained them.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ubmd.errors import ModelError
from ubmd.files import replacing
from ubmd.potentials.gmnn.model import GaussianMomentNetwork

FORMAT = 1


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """``torch.save`` to a temporary file that is renamed once it is on disk."""
    with replacing(path) as file:
        torch.save(_on_cpu(content), file)


def _on_cpu(value: Any) -> Any:
    """The same with tensors on the CPU, also those in dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


def save_weights(model: GaussianMomentNetwork, path: Path) -> None:
    """Write architecture and weights of a model."""
    save_atomically({"format": FORMAT, "kind": "weights", **model_state(model)}, path)


def load_weights(path: Path) -> GaussianMomentNetwork:
    """The model of a weights file, in the precision that it was trained in.

    Raises:
        ModelError: the file is missing, corrupt, or something else.
    """
    content = load(path, "weights")
    try:
        return restore_model(content)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} does not fit this version of ubmd ({_first_line(error)}); train again.") from None


def load(path: Path, *kinds: str) -> dict[str, Any]:
    """Content of a file of one of these kinds: weights, checkpoint.

    Raises:
        ModelError: the file is missing, corrupt, or of another kind or format.
    """
    kind = " or ".join(kinds)
    try:
        with warnings.catch_warnings():  # torch warns about TorchScript files before it refuses them
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ModelError(f"There is no {kind} file {path}.") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError) as error:
        raise ModelError(f"{path} is not a {kind} file of ubmd, or it is corrupt ({_first_line(error)}).") from None
    if not isinstance(content, dict) or content.get("kind") not in kinds:
        raise ModelError(f"{path} is not a {kind} file of ubmd.")
    if content.get("format") != FORMAT:
        raise ModelError(f"{path} has format {content.get('format')}, this version of ubmd reads {FORMAT}.")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def model_state(model: GaussianMomentNetwork) -> dict[str, Any]:
    """Architecture, precision and a copy of the weights, on the CPU."""
    state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
    return {"config": model.config(), "dtype": str(model.radial.dtype).removeprefix("torch."), "model": state}


def restore_model(content: dict[str, Any]) -> GaussianMomentNetwork:
    """Inverse of `model_state`."""
    model = GaussianMomentNetwork.from_config(content["config"])
    model.to_network_dtype(getattr(torch, content["dtype"]))
    model.load_state_dict(content["model"])
    return model
