"""Predict many structures in batches: the most uncertain ones are worth a label.

python train.py makes the model file.
"""

import time

import numpy as np
from ase.build import bulk
from ase.io import write

import ubmd

rng = np.random.default_rng(0)
frames = []
for k in range(200):
    atoms = bulk("Cu", cubic=True) * (1, 1, 1 + k % 3)  # of several sizes
    atoms.symbols[rng.random(len(atoms)) < 0.3] = "Au"
    atoms.rattle(rng.uniform(0.02, 0.2), seed=k)
    frames.append(atoms)

model = ubmd.Model("alloy_model/model.pt")
begin = time.perf_counter()
found = ubmd.evaluate(model, frames)
print(f"{len(found)} structures in {time.perf_counter() - begin:.2f} s")

most = np.argsort(found.max_u)[::-1][:10]
print("most uncertain:", ", ".join(f"{k} ({found.max_u[k]:.2f} eV/Å)" for k in most))
write("uncertain.extxyz", [found.as_atoms()[k] for k in most])
