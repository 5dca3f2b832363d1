"""What is done in the Python that has MACE: ``python inside.py COMMAND REQUEST.json ANSWER.json``.

Nothing of ubmd is imported, only torch and MACE. A checkpoint of MACE is a pickle, which runs code when it is loaded:
here, and nowhere else. The process ends as soon as its standard input does, so that it never outlives ubmd.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import warnings
from importlib import import_module, metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def die_with_parent() -> None:
    """End this session when ubmd, which holds the other end of the standard input, has ended, however that happens."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        if os.getpgid(0) == os.getpid():  # with what it has started
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def wrapper() -> Any:
    """The module beside this one; its folder is not in the path, so that no name in it hides a package."""
    spec = spec_from_file_location("ubmd_mace_wrapper", Path(__file__).with_name("wrapper.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def versions(_: dict[str, Any]) -> dict[str, Any]:
    """Versions of the packages, GPUs, and the arguments of mace_run_train, with whether they take a value."""
    import torch
    from mace.tools import build_default_arg_parser

    options = [(name, action) for action in build_default_arg_parser()._actions for name in action.option_strings]
    return {
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "versions": {package: metadata.version(package) for package in ("mace-torch", "e3nn", "torch")},
        "arguments": {name[2:]: action.nargs != 0 for name, action in options if name.startswith("--")},
    }


def load(path: str) -> Any:
    """The network in a checkpoint, on the CPU; TorchScript compiles with its precision as the default one."""
    import torch

    network = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(network, torch.nn.Module):
        raise wrapper().Unknown("it holds no network but weights or a state of a training; give the .model file")
    torch.set_default_dtype(next(network.parameters()).dtype)
    return network.eval()


def convert(request: dict[str, Any]) -> dict[str, Any]:
    """Write the TorchScript module of a checkpoint, once it gives the same energies and forces as the network."""
    import torch
    from ase.data import chemical_symbols
    from e3nn.util import jit

    network = load(request["checkpoint"])
    elements = [chemical_symbols[int(number)] for number in network.atomic_numbers]
    wrapped = wrapper().Wrapped(network, request["features"], request["projections"], request["seed"], elements).eval()
    compare(network, wrapped)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    scripted = jit.compile(wrapped)
    if not isinstance(scripted, torch.jit.ScriptModule):
        scripted = torch.jit.script(scripted)
    torch.jit.save(scripted, request["module"])
    return {"elements": elements, "version": metadata.version("mace-torch")}


def compare(network: Any, wrapped: Any) -> None:
    """Unknown if the network's own forward gives other energies or forces for a few random atoms."""
    import torch

    dtype = next(network.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    corners = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    step = min(1.5, 0.4 * float(network.r_max))  # Å: near enough for a repulsion of nuclei to count
    places = step * (corners + 0.2 * torch.rand(8, 3, generator=generator, dtype=torch.float64))
    species = torch.arange(8) % len(network.atomic_numbers)
    difference = places.unsqueeze(0) - places.unsqueeze(1)  # from row to column
    near = (difference.norm(dim=2) < float(network.r_max)) & ~torch.eye(8, dtype=torch.bool)
    centre, neighbour = near.nonzero().t()
    data = {
        "positions": places.to(dtype),
        "node_attrs": torch.nn.functional.one_hot(species, len(network.atomic_numbers)).to(dtype),
        "edge_index": torch.stack([neighbour, centre]),
        "shifts": torch.zeros(len(centre), 3, dtype=dtype),
        "unit_shifts": torch.zeros(len(centre), 3, dtype=dtype),
        "cell": torch.zeros(3, 3, dtype=dtype),
        "batch": torch.zeros(8, dtype=torch.int64),
        "ptr": torch.tensor([0, 8]),
        "head": torch.zeros(1, dtype=torch.int64),
    }
    expected = network(data, compute_force=True)
    edge = difference[centre, neighbour].requires_grad_(True)
    energy = wrapped(species, torch.stack([centre, neighbour]), edge, 8)[0].sum()
    (gradient,) = torch.autograd.grad(energy, edge)
    forces = torch.zeros(8, 3, dtype=torch.float64).index_add(0, centre, gradient).index_add(0, neighbour, -gradient)
    allowed = 1e-9 if dtype == torch.float64 else 1e-4
    found = (
        abs(float(energy - expected["energy"].double())) / (1.0 + abs(float(energy))),
        float((forces - expected["forces"].double()).abs().max()) / (1.0 + float(forces.abs().max())),
    )
    if max(found) > allowed:
        raise wrapper().Unknown(
            f"its own energies and forces differ from those of the converted module by {found[0]:.1e} and "
            f"{found[1]:.1e} (relative): it has parts that ubmd does not know"
        )


def shift(request: dict[str, Any]) -> dict[str, Any]:
    """Write a checkpoint whose energies of isolated atoms are changed by constants (element -> eV)."""
    import torch
    from ase.data import atomic_numbers

    network = load(request["checkpoint"])
    numbers = [int(number) for number in network.atomic_numbers]
    # Total energies of heavy atoms have more digits than float32; MACE converts what it needs.
    energies = network.atomic_energies_fn.atomic_energies.detach().double()
    for element, value in request["constants"].items():
        energies[..., numbers.index(atomic_numbers[element])] += value
    network.atomic_energies_fn.atomic_energies = energies
    torch.save(network, request["target"])
    return {}


def train(request: dict[str, Any]) -> dict[str, Any]:
    """MACE's own command, mace_run_train, with its arguments as they are."""
    import torch

    torch.set_num_threads(request["threads"])
    sys.argv = ["mace_run_train", *request["arguments"]]
    runpy.run_module("mace.cli.run_train", run_name="__main__")
    return {}


COMMANDS = {"versions": versions, "convert": convert, "shift": shift, "train": train}


def main(command: str, request: str, answer: str) -> None:
    """Do it; an error that the user can act on is part of the answer."""
    die_with_parent()
    sys.path.pop(0)  # this folder
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn 0.4.4 and MACE load pickles of objects
    warnings.filterwarnings("ignore")
    import_module("mace")  # what is missing is this, not what it needs
    try:
        found = COMMANDS[command](json.loads(Path(request).read_text(encoding="utf-8")))
    except Exception as error:
        if type(error).__name__ != "Unknown":
            raise
        found = {"error": str(error)}
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
