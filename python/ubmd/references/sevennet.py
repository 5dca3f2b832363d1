"""SevenNet, a foundation model for materials, with the weights that its package contains."""

from __future__ import annotations

import threading
from pathlib import Path

from ubmd.faults import in_worker
from ubmd.references.networks import network_calculator, quiet, weights_file
from ubmd.references.programs import ProgramCalculator

_NAMES = {
    "7net-0": "SEVENNET_0_11Jul2024",
    "7net-0_22may2024": "SEVENNET_0_22May2024",
    "7net-l3i5": "SEVENNET_l3i5",
    "7net-mf-0": "SEVENNET_MF_0",
}
"""Names in SevenNet's documentation -> names of the files' paths in sevenn._const."""


def sevennet(model: str = "7net-0", device: str = "cpu", modal: str | None = None) -> ProgramCalculator:
    """SevenNet: energy in eV, forces in eV/Å, stress in eV/Å^3 (Park et al., J. Chem. Theory Comput. 20, 4857 (2024)).

    SevenNet-0 was trained on MPtrj: relaxations of the Materials Project, with PBE and PBE+U. It computes in float32:
    forces have noise of about 2e-6 eV/Å. A structure with an atom that has no neighbour within the cutoff (5 Å) is
    rejected, and so is a charged one. Threads: OMP_NUM_THREADS, 1 in a worker unless reference.environment says
    otherwise.

    Args:
        model: weights in the package, '7net-0' (the default), '7net-0_22may2024', '7net-l3i5' or '7net-mf-0'; or a
            checkpoint of SevenNet, relative to the settings file. Such a file is a pickle, which can run any code.
            Nothing is downloaded.
        device: of torch: 'cpu', 'cuda', 'cuda:1', ...
        modal: level of theory, for models that have several; SevenNet's message lists them if it is missing.

    Raises:
        ImportError: sevenn is not installed.
        SettingsError: no such weights; when it labels: an element that the network was not trained on.
    """
    with quiet():
        from sevenn import _const
        from sevenn.calculator import SevenNetCalculator

        shipped = {name: _shipped(_const, attribute) for name, attribute in _NAMES.items()}
        shipped = {name: path for name, path in shipped.items() if path is not None}
        path = weights_file(model, shipped, "sevenn") or shipped[model]
        _keep_tqdm_local()
        # By its path: given a name, SevenNet would look for weights elsewhere, too, and download them.
        calculator = SevenNetCalculator(str(path), device=device, modal=modal)
    return network_calculator("SevenNet", model, calculator, frozenset(calculator.type_map), float(calculator.cutoff))


def _keep_tqdm_local() -> None:
    """In a worker, give tqdm a lock among threads, as there is one process.

    Its own, which building SevenNet makes, takes a semaphore of the system, and Python would warn of it when the worker
    is ended.
    """
    if in_worker():
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())


def _shipped(constants: object, attribute: str) -> Path | None:
    """The file behind a constant of sevenn, or None if this version does not contain it."""
    path = getattr(constants, attribute, None)
    return Path(path) if path is not None and Path(path).is_file() else None
