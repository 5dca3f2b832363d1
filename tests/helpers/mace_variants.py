"""Small networks of MACE with random weights, for tests: ``PYTHON mace_variants.py FOLDER``, in MACE's Python."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mace  # noqa: F401 (before e3nn 0.4.4, which otherwise cannot be imported with newer versions of torch)
import numpy as np
import torch
from e3nn import o3
from mace import modules

COMMON: dict[str, Any] = {
    "r_max": 4.0,
    "num_bessel": 4,
    "num_polynomial_cutoff": 5,
    "max_ell": 2,
    "interaction_cls": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
    "interaction_cls_first": modules.interaction_classes["RealAgnosticInteractionBlock"],
    "num_elements": 3,
    "hidden_irreps": o3.Irreps("4x0e+4x1o"),
    "MLP_irreps": o3.Irreps("4x0e"),
    "atomic_energies": np.array([-13.5, -1000.25, -40000.75]),
    "avg_num_neighbors": 8.0,
    "atomic_numbers": [1, 8, 79],
    "correlation": 2,
    "gate": torch.nn.functional.silu,
}
SCALED = {"atomic_inter_scale": 0.7, "atomic_inter_shift": 0.3}


def variants() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    scaled, plain = modules.ScaleShiftMACE, modules.MACE
    density = modules.interaction_classes["RealAgnosticDensityResidualInteractionBlock"]
    return {
        "one": scaled(**COMMON, **SCALED, num_interactions=1),
        "three": scaled(**COMMON, **SCALED, num_interactions=3),
        "plain": plain(**COMMON, num_interactions=2),
        "repulsion": scaled(**COMMON, **SCALED, num_interactions=2, pair_repulsion=True, distance_transform="Agnesi"),
        "plain repulsion": plain(**COMMON, num_interactions=2, pair_repulsion=True),
        "last readout": scaled(**COMMON, **SCALED, num_interactions=2, use_last_readout_only=True),
        "density": scaled(**{**COMMON, "interaction_cls": density}, **SCALED, num_interactions=2),
        "ethanol": scaled(
            **{**COMMON, "atomic_numbers": [1, 6, 8], "hidden_irreps": o3.Irreps("8x0e+8x1o")},
            **SCALED,
            num_interactions=2,
        ),
        "tanh": scaled(**{**COMMON, "gate": torch.tanh}, **SCALED, num_interactions=2),
        "heads": scaled(
            **{**COMMON, "atomic_energies": np.stack([COMMON["atomic_energies"]] * 2)},
            atomic_inter_scale=[1.0, 1.0],
            atomic_inter_shift=[0.0, 0.0],
            num_interactions=2,
            heads=["pt_head", "mine"],
        ),
    }


def main(folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    for name, network in variants().items():
        torch.save(network, Path(folder, f"{name}.model"))
    torch.set_default_dtype(torch.float32)
    torch.save(modules.ScaleShiftMACE(**COMMON, **SCALED, num_interactions=2), Path(folder, "float32.model"))


if __name__ == "__main__":
    main(*sys.argv[1:])
