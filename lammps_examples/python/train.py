"""Train a model on labels that you have, and look at its errors on others.

Any file of labelled structures does; here, shaken copper-gold alloys are labelled by EMT, a toy for metals.
"""

import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT

import ubmd


def labelled(seed: int):
    """A shaken and strained alloy with energy, forces and stress."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.symbols[rng.choice(len(atoms), 2, replace=False)] = "Au"
    atoms.set_cell(atoms.cell @ (np.eye(3) + 0.02 * rng.standard_normal((3, 3))), scale_atoms=True)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT()
    atoms.get_forces(), atoms.get_stress()
    return atoms


frames = [labelled(seed) for seed in range(60)]
settings = {"output_dir": "alloy_model", "training": {"epochs": 100}, "validation_share": 0.2}
model = ubmd.train(frames[:50], settings)

found = ubmd.evaluate(model, frames[50:])
print(found.errors())
print(model.path)  # for LAMMPS: pair_style ubmd, pair_coeff * * alloy_model/model.pt Cu Au
