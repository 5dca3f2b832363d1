"""Time per atom of force-constant potentials through the interface of their files, on one core.

    OMP_NUM_THREADS=1 python tests/benchmarks/crystal.py [names]

A row per model: a force step, one with features, a step with the bias (forces, features, uncertainty and its gradient,
gradient of the features), u of all atoms. Boxes of about 512 atoms.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

from ubmd.operators import load
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.model import CrystalModel
from ubmd.potentials.force_constants.regression import Posterior


def silicon() -> Atoms:
    return bulk("Si", "diamond", 5.43)


def boron_arsenide() -> Atoms:
    return bulk("BAs", "zincblende", 4.777)


def tin_selenide() -> Atoms:
    places = []
    for x, z in ((0.118, 0.103), (0.855, 0.482)):
        places += [(x, 0.25, z), (-x, 0.75, -z), (0.5 - x, 0.75, 0.5 + z), (0.5 + x, 0.25, 0.5 - z)]
    return Atoms("Sn4Se4", scaled_positions=places, cell=[11.501, 4.153, 4.445], pbc=True)


MODELS = {
    "Si127": (silicon, (5.4, 4.0, 4.0), (8, 8, 4)),
    "Si690": (silicon, (7.5, 5.0, 5.0), (8, 8, 4)),
    "BAs1805": (boron_arsenide, (5.5, 4.5, 4.5, 3.5), (8, 8, 4)),
    "BAs2164": (boron_arsenide, (8.35, 3.5, 3.5, 3.5, 3.5), (8, 8, 4)),
    "SnSe351": (tin_selenide, (5.7, 3.53, 3.53, 3.53, 3.53), (2, 6, 5)),
}


def seconds(run: Callable[[], object], least: float = 0.5) -> float:
    """Shortest processor time of a call among several rounds."""
    run()
    times, start = [], time.process_time()
    while time.process_time() - start < least or len(times) < 3:
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)


def measure(name: str) -> str:
    crystal, cutoffs, repeats = MODELS[name]
    basis = ClusterBasis.build(crystal(), dict(enumerate(cutoffs, start=2)))
    orders, p = basis.parameter_orders, basis.n_parameters
    rng = np.random.default_rng(1)
    factor = np.triu(rng.normal(size=(p, p))) * 0.01
    posterior = Posterior(orders, rng.normal(size=p), factor, {}, {}, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        torch.jit.script(CrystalModel(basis, posterior, max_displacement=1.0)).save(str(file))
        size, begin = file.stat().st_size / 1e6, time.process_time()
        model = torch.jit.load(str(file))
        loading = time.process_time() - begin
    model.eval()
    box = basis.supercell(crystal().repeat(repeats))
    n = len(box)
    sites = [np.array(rows) for rows in json.loads(model.metadata())["lattice"]["sites"]]
    edges = [sites[s] + [*offset, 0] for s, offset in zip(box.sublattice, box.offset, strict=True)]
    first = torch.tensor(np.cumsum([0, *[len(rows) for rows in edges]]))
    joined = np.concatenate(edges)
    u = rng.normal(size=(n, 3)) * 0.1
    displacement = torch.from_numpy(u[box.index(joined[:, 3], joined[:, :3])])
    species = torch.from_numpy(box.sublattice)

    def forces(keep: bool = False) -> list:
        return model.evaluate(species, first, first, displacement, keep)[2]

    def features() -> tuple:
        tape = forces(True)
        return tape, model.feature_sum(model.features(tape, True)[0])

    def bias() -> torch.Tensor:
        tape, phi = features()
        mean = (phi / n).requires_grad_(True)
        (w,) = torch.autograd.grad(model.uncertainty(mean), mean)
        return model.feature_gradient(tape, [], model.directions(w, True), w)

    tape = forces(True)
    times = [seconds(run) / n * 1e6 for run in (forces, features, bias, lambda: model.site_uncertainties(tape))]
    row = "".join(f"{t:12.2f}" for t in times)
    return f"{name:10s}{n:6d}{p:6d}{row}{times[2] / times[0]:9.1f}{times[3] / times[0]:9.1f}{size:8.1f}{loading:8.2f}"


if __name__ == "__main__":
    load()
    torch.set_num_threads(1)
    print("                            forces    features        bias  deviations     bias     dev.    file    load")
    print("model      atoms     P     µs/atom     µs/atom     µs/atom     µs/atom  /forces  /forces      MB       s")
    for wanted in sys.argv[1:] or MODELS:
        print(measure(wanted), flush=True)
