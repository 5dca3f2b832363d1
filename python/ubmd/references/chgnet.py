"""CHGNet, a foundation model for materials, with the weights that its package contains."""

from __future__ import annotations

from ase.data import atomic_numbers

from ubmd.references.networks import network_calculator, quiet, weights_file
from ubmd.references.programs import ProgramCalculator

MODELS = ("0.3.0", "0.2.0", "r2scan")
_NOT_TRAINED = ("Po", "At", "Rn", "Fr", "Ra")  # none in MPtrj: their embeddings have their initial, random values
ELEMENTS = frozenset(range(1, 95)) - {atomic_numbers[symbol] for symbol in _NOT_TRAINED}
"""Atomic numbers of the 89 elements in MPtrj."""


def chgnet(model: str = "0.3.0", device: str = "cpu") -> ProgramCalculator:
    """CHGNet: energy in eV, forces in eV/Å, stress in eV/Å^3 (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)).

    Trained on MPtrj: relaxations of the Materials Project, with PBE and PBE+U. It computes in float32: forces have
    noise of about 1e-4 eV/Å. Its magnetic moments are no labels, and initial moments do not change it. A structure
    with an atom that has no neighbour within the cutoff (6 Å) is rejected, and so is a charged one. Threads:
    OMP_NUM_THREADS, 1 in a worker unless reference.environment says otherwise.

    Args:
        model: weights in the package, '0.3.0' (the default), '0.2.0' or 'r2scan'; or a checkpoint of CHGNet, relative
            to the settings file. Such a file is a pickle, which can run any code. Nothing is downloaded.
        device: of torch: 'cpu', 'cuda', 'cuda:1', ...

    Raises:
        ImportError: chgnet is not installed.
        SettingsError: no such weights; when it labels: an element that the network was not trained on.
    """
    path = weights_file(model, MODELS, "chgnet")
    with quiet():
        from chgnet.model import CHGNet
        from chgnet.model.dynamics import CHGNetCalculator

        if path is None:
            network = CHGNet.load(model_name=model, use_device=device, verbose=False)
        else:
            network = CHGNet.from_file(str(path))
        calculator = CHGNetCalculator(network, use_device=device, on_isolated_atoms="error")
    cutoff = float(network.graph_converter.atom_graph_cutoff)
    # Without magnetic moments, which are no labels.
    return network_calculator("CHGNet", model, calculator, ELEMENTS, cutoff, task="efs")
