"""What MACE itself says, for tests: ``PYTHON mace_oracle.py CHECKPOINT STRUCTURES.xyz OUT.npz``, in MACE's Python.

Of every structure k: ``energy_k`` (eV), ``forces_k`` (eV/Å), ``virial_k`` (eV, minus the derivative by the strain),
from its calculator for ASE; and ``first_k``, ``hidden_k``, ``last_k``: derivatives of the energy of every atom by
the weights of the readouts (linear; first and last layer of the other), by autograd on the network's own forward.
"""

from __future__ import annotations

import sys

import ase.io
import numpy as np
import torch
from mace.calculators import MACECalculator


def main(checkpoint: str, structures: str, out: str) -> None:
    calculator = MACECalculator(model_paths=[checkpoint], device="cpu", default_dtype="float64")
    network = calculator.models[0]
    first, last = network.readouts[0], network.readouts[-1]
    derivatives = hasattr(first, "linear") and hasattr(last, "linear_1")
    weights = [first.linear.weight, last.linear_1.weight, last.linear_2.weight] if derivatives else []
    found: dict[str, np.ndarray] = {}
    for k, atoms in enumerate(ase.io.iread(structures)):
        atoms.calc = calculator
        found[f"energy_{k}"] = np.array(atoms.get_potential_energy())
        found[f"forces_{k}"] = atoms.get_forces()
        if atoms.pbc.all():
            found[f"virial_{k}"] = -atoms.get_stress(voigt=True) * atoms.get_volume()
        if not derivatives:
            continue
        for weight in weights:
            weight.requires_grad_(True)
        energies = network(calculator._atoms_to_batch(atoms).to_dict(), compute_force=False)["node_energy"]
        rows = [torch.autograd.grad(energy, weights, retain_graph=True) for energy in energies]
        for name, each in zip(("first", "hidden", "last"), zip(*rows, strict=True), strict=True):
            found[f"{name}_{k}"] = torch.stack([gradient.reshape(-1) for gradient in each]).numpy()
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
