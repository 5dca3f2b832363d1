"""Monte Carlo fixes of LAMMPS: numbers of particles, and a monitor that looks at no trial."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from ase.io import read

BOLTZMANN, PLANCK, MVV2E = 8.617343e-5, 4.135667403e-3, 1.0364269e-4  # LAMMPS's own, units metal
OWN_ENERGY, TEMPERATURE, EDGE = -3.0, 300.0, 30.0  # eV, K, Å


class IdealGas(torch.nn.Module):
    """A model file of atoms that don't interact; each has the same energy, feature and uncertainty."""

    def __init__(self, energy: float) -> None:
        super().__init__()
        self.energy = energy
        self.record = json.dumps({"format": 1, "elements": ["H"], "cutoff": 2.0, "uncertainty": {"projections": 1}})

    def forward(
        self, species: torch.Tensor, edge_index: torch.Tensor, edge_vector: torch.Tensor, n_local: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        none = 0.0 * edge_vector.sum() + torch.zeros([n_local], dtype=edge_vector.dtype)
        return none + self.energy, (none + 1.0).unsqueeze(1)

    @torch.jit.export
    def forces(
        self, species: torch.Tensor, edge_index: torch.Tensor, edge_vector: torch.Tensor, n_local: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full([n_local], self.energy, dtype=edge_vector.dtype), torch.zeros_like(edge_vector)

    @torch.jit.export
    def uncertainty(self, phi_mean: torch.Tensor) -> torch.Tensor:
        return phi_mean.norm()

    @torch.jit.export
    def atomic_uncertainties(self, phi: torch.Tensor) -> torch.Tensor:
        return phi[:, 0]

    @torch.jit.export
    def metadata(self) -> str:
        return self.record


def gas(mean: float) -> str:
    """Script of an ideal gas at the chemical potential of a mean number: own energy + kT ln(N Λ³/V)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(IdealGas(OWN_ENERGY)).save("gas.pt")
    kt = BOLTZMANN * TEMPERATURE
    wavelength = PLANCK / math.sqrt(2.0 * math.pi * 1.008 * MVV2E * kt)
    mu = OWN_ENERGY + kt * math.log(mean * wavelength**3 / EDGE**3)
    return f"""
        units metal
        atom_style atomic
        region r block 0 {EDGE} 0 {EDGE} 0 {EDGE}
        create_box 1 r
        mass 1 1.008
        create_atoms 1 random 20 77 r
        pair_style ubmd precision double
        pair_coeff * * gas.pt H
        fix g all gcmc 1 50 0 1 29494 {TEMPERATURE} {mu:.17g} 0.0
        fix b all ubmd
        variable n equal atoms
        variable pe equal pe
        fix n all print 1 "GAS ${{n}} ${{pe}} $(f_b[1]) $(f_b[2]) $(f_b[3]) $(f_b[9])" screen yes
        """


def numbers_of(outcome) -> np.ndarray:
    """Rows [atoms, energy, u, largest, mean, sigma] of all steps."""
    rows = [line.split()[1:] for line in outcome.text.splitlines() if line.startswith("GAS ")]
    return np.array(rows, dtype=float)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ideal_gas(lab, ranks):
    """⟨N⟩ = V exp((μ − E0)/kT)/Λ³ = 20, a Poisson distribution; the energy and u are those of the atoms there.

    The seed is fixed; the standard error of 8000 exchanges is about 0.5.
    """
    n, energy, u, largest, mean, sigma = numbers_of(lab.run(gas(20.0) + "run 160\n", ranks)).T
    assert len(n) == 161
    assert abs(n.mean() - 20.0) < 2.5
    assert 3.0 < n.std() < 6.5
    assert np.array_equal(energy, OWN_ENERGY * n)
    for values in (u, largest, mean):
        assert (values == 1.0).all()
    assert np.array_equal(sigma, n)


H2 = """H2

2 atoms

Coords

1 0.0 0.0 0.0
2 0.74 0.0 0.0

Types

1 1
2 1
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_ideal_gas_of_molecules(lab, ranks):
    """The same with insertions and deletions of two atoms at once, from an empty box: ⟨N⟩ = 10 molecules."""
    (lab.folder / "h2.txt").write_text(H2)
    kt = BOLTZMANN * TEMPERATURE
    wavelength = PLANCK / math.sqrt(2.0 * math.pi * 2.016 * MVV2E * kt)
    mu = 2.0 * OWN_ENERGY + kt * math.log(10.0 * wavelength**3 / EDGE**3)
    script = gas(20.0).replace("atom_style atomic", "atom_style molecular\nspecial_bonds lj/coul 1.0 1.0 1.0")
    lines = [line for line in script.splitlines() if "create_atoms" not in line and "fix g" not in line]
    script = "\n".join(lines).replace(
        "fix b", f"group gas empty\nfix g gas gcmc 1 40 0 0 29494 300 {mu:.17g} 0 mol m\nfix b"
    )
    script = script.replace("pair_style", "molecule m h2.txt\npair_style")
    n, energy, *_, sigma = numbers_of(lab.run(script + "\nrun 150\n", ranks)).T
    assert abs(0.5 * n[20:].mean() - 10.0) < 2.0
    assert np.array_equal(energy, OWN_ENERGY * n)
    assert np.array_equal(sigma, n)


def test_the_box_may_become_empty(lab):
    """Without atoms u and all else are 0, and the run goes on."""
    n, energy, u, largest, mean, sigma = numbers_of(lab.run(gas(0.5) + "run 60\n")).T
    assert n.min() == 0.0 < n[1:].max()
    assert np.array_equal(energy, OWN_ENERGY * n)
    for values in (u, largest, mean):
        assert np.array_equal(values, (n > 0).astype(float))
    assert np.array_equal(sigma, n)


BIAS = "force 0.2 window 3 every 3 "
MOVES = {
    "gcmc": "fix mc all gcmc 2 10 6 2 29494 20000 -21.0 0.6\n",
    "widom": "fix mc all widom 2 6 2 29494 20000\n",
    "atom/swap": "fix mc all atom/swap 2 6 29494 20000 ke no types 1 2\n",
}


@pytest.mark.parametrize(
    ("kind", "order", "bias", "ranks"),
    [
        ("gcmc", "before", "", 1),
        ("gcmc", "after", BIAS, 2),
        ("widom", "before", "", 2),
        ("atom/swap", "after", "", 1),
        ("atom/swap", "before", BIAS, 2),
    ],
)
def test_trials_are_not_looked_at(lab, evaluator, structures, kind, order, bias, ranks):
    """Every evaluated step has one frame, whose u_i are those of its atoms; a trial neither stops nor is saved."""
    script = lab.head(structures["cubic"]) + "velocity all create 300.0 31\ntimestep 0.0002\nfix move all nve\n"
    monitor = f"fix b all ubmd {bias}save 0.0 frames.extxyz stop {{}}\n"
    lines = [monitor, MOVES[kind]] if order == "before" else [MOVES[kind], monitor]
    script += "".join(lines) + "dump d all custom 1 dump.test id type xu yu zu\n"
    script += "dump_modify d sort id format float %.17g\n" + lab.every_step("f_b[2]") + "run 12\n"
    script += lab.report("step", "f_b[6]", "f_b[8]", *(["f_mc[2]", "f_mc[4]", "f_mc[6]"] if kind == "gcmc" else []))
    calm = lab.run(script.format(1e6), ranks)
    frames, dumped = read("frames.extxyz", ":"), lab.dump("dump.test")
    steps = [frame.info["step"] for frame in frames]
    assert steps == list(range(0, 13, 3 if bias else 1))
    assert calm.numbers["f_b[8]"] == [len(steps)]
    assert calm.numbers["f_b[6]"][0] == (pytest.approx(0.2, rel=0.5) if bias else 0.0)
    for frame in frames:
        columns = dumped[frame.info["step"]]
        assert frame.arrays["id"].tolist() == columns["id"].tolist()
        assert np.array_equal(frame.positions, np.stack([columns[k] for k in ("xu", "yu", "zu")], 1))
        expected = evaluator.predict_one(frame)
        assert frame.info["uncertainty"] == pytest.approx(expected.u, rel=1e-9)
        assert np.allclose(frame.arrays["atomic_uncertainty"], expected.atomic_u, rtol=1e-9)
    if kind == "gcmc":
        accepted = [calm.numbers[f"f_mc[{k}]"][0] for k in (2, 4, 6)]  # moves, insertions, deletions
        assert min(accepted) > 0.0, accepted
    largest = max(frame.info["max_uncertainty"] for frame in frames)
    again = lab.run(script.format(f"{1.0001 * largest:.17g}"), ranks)
    assert again.numbers["step"] == [12.0]
