"""Model files in plain torch, as they run on a GPU, against files with the compiled operators (1e-10).

The pair style decides what to do without derivatives by whether there are operators on the device; a file without them
takes the same branches on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from ubmd.data.graph import build_graph
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.settings import ModelSettings, UncertaintySettings

ELEMENTS = ["H", "C", "O"]
KINDS = ["posterior", "last-layer", "distance", "ensemble"]
BIASES = {
    "energy": "force 0.25 stress 0.4",
    "energy alone": "force 0.25 atoms no",
    "atomic": "uncertainty atomic force 0.25 stress 0.4",
    "monitor": "",
}
TOTALS = ("pe", "pxx", "pyy", "pzz", "pxy", "pxz", "pyz")


@pytest.fixture(scope="module")
def files(structures, tmp_path_factory) -> dict[tuple[str, bool], Path]:
    """(kind, operators) -> model file with random weights."""
    rng, labelled = np.random.default_rng(5), []
    for k in range(8):
        atoms = structures["molecule" if k % 2 else "cubic"].copy()
        atoms.positions += rng.normal(0.0, 0.05, atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(len(atoms), 3)))
        labelled.append(atoms)
    folder, found = tmp_path_factory.mktemp("models"), {}
    for kind in KINDS:
        settings = UncertaintySettings(kind=kind, projections=12, references=15, alpha=0.3)
        models = [
            GaussianMomentNetwork(ELEMENTS, ModelSettings(hidden=(16, 12), cutoff=4.0), seed)
            for seed in range(settings.networks)
        ]
        for model in models:
            model.initialise_energies([build_graph(atoms, ELEMENTS, 4.0) for atoms in labelled])
        for operators in (True, False):
            found[kind, operators] = path = folder / f"{kind}-{operators}.pt"
            export_model(models, labelled[:6], labelled[6:], settings, path, operators=operators)
    return found


def state(lab, atoms, model: Path, bias: str) -> dict[str, np.ndarray]:
    """Everything after three steps with a bias in each but the first."""
    (lab.folder / "model.pt").write_bytes(model.read_bytes())
    script = lab.head(atoms).replace("data.test", str(lab.folder / "data.test"))
    script = script.replace("model.pt", str(lab.folder / "model.pt"))
    script += f"timestep 0.0002\nfix move all nve\nfix b all ubmd {bias} window 1\n"
    script += f"thermo_style custom step {' '.join(TOTALS)} f_b\n"
    with lab.session(f"{script}\nrun 3\n") as lammps:
        order = np.argsort(lammps.numpy.extract_atom("id")[: len(atoms)])
        forces = np.array(lammps.numpy.extract_atom("f"))[: len(atoms)][order]
        each = np.array(lammps.numpy.extract_fix("b", 1, 2))[: len(atoms)][order]
        totals = np.array([lammps.get_thermo(name) for name in TOTALS])
        of_fix = [lammps.extract_fix("b", 0, 0), *(lammps.extract_fix("b", 0, 1, k) for k in range(8))]
    return {"forces": forces, "of atoms": each, "of fix": np.array(of_fix), "totals": totals}


@pytest.mark.parametrize("path", ["all at once", "blocks"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_torch_equals_the_operators(lab, files, structures, kind, bias, path):
    lab.set_path(path)
    words = BIASES[bias]
    found, expected = (state(lab, structures["cubic"], files[kind, operators], words) for operators in (False, True))
    assert expected["of fix"][1] > 0.0
    assert (np.abs(expected["of atoms"][:, 1:]).max() > 0.0) == (bias != "monitor")
    for name, value in expected.items():
        scale = max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-10 * scale, err_msg=name)
