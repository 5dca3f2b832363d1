"""What the build is compiled against: Python's torch, or that of a folder which the user names."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.find_spec("torch")
assert SPEC is not None
assert SPEC.origin is not None
TORCH = Path(SPEC.origin).parent
VERSION = version("torch").split("+")[0]


def find_wheels(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cpp/find_wheels.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def archive(folder: Path, version: str) -> Path:
    """A folder like an unpacked libtorch: no package, its version in a file of its own."""
    folder.mkdir()
    for name in ("lib", "include"):
        (folder / name).symlink_to(TORCH / name)
    (folder / "build-version").write_text(f"{version}\n")
    return folder


def test_the_torch_of_python_is_the_default() -> None:
    found = find_wheels().stdout
    assert f'set(UBMD_TORCH_ROOT "{TORCH.as_posix()}")' in found
    assert find_wheels(TORCH).stdout == found.replace(TORCH.as_posix(), TORCH.resolve().as_posix())


def test_an_unpacked_libtorch(tmp_path: Path) -> None:
    folder = archive(tmp_path / "libtorch", f"{VERSION}+cu130")
    lines = find_wheels(folder).stdout.splitlines()
    assert f'set(UBMD_TORCH_ROOT "{folder}")' in lines
    assert f'set(UBMD_TORCH_VERSION "{VERSION}")' in lines


def test_a_folder_that_is_no_torch(tmp_path: Path) -> None:
    ended = find_wheels(tmp_path / "nowhere")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"UBMD_TORCH_ROOT: {tmp_path}/nowhere is no torch (it has no lib/libtorch.so): give")
    (archive(tmp_path / "nameless", "") / "build-version").unlink()
    assert "nameless is no torch (it has neither version.py nor" in find_wheels(tmp_path / "nameless").stderr


def test_another_version(tmp_path: Path) -> None:
    ended = find_wheels(archive(tmp_path / "old", "2.12.1+cu126"))
    assert ended.returncode == 1
    assert f"old holds torch 2.12.1, but this version of ubmd is made for torch {VERSION}" in ended.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_says_so(tmp_path: Path) -> None:
    pybind11 = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True)
    if pybind11.returncode:
        pytest.skip("pybind11 is not installed")
    command = ["cmake", "-S", ROOT, "-B", tmp_path, f"-Dpybind11_DIR={pybind11.stdout.strip()}"]
    ended = subprocess.run([*command, f"-DUBMD_TORCH_ROOT={tmp_path}"], capture_output=True, text=True)
    assert ended.returncode != 0
    assert "is no torch (it has no lib/libtorch.so)" in " ".join(ended.stderr.split())


def test_the_pages_name_what_a_build_without_isolation_needs() -> None:
    """All but torch, which is the user's own, and numpy, which comes with ubmd."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    lines = (ROOT / "python/README.md").read_text().splitlines()
    (installed,) = (before for before, line in pairwise(lines) if line.startswith("pip install . --no-build-isolation"))
    named = {word.strip("'") for word in installed.removeprefix("pip install ").split()}
    needed = (requirement.partition(";")[0].partition(">=")[0] for requirement in requires)
    assert named == {name for name in needed if name != "numpy" and not name.startswith("torch")}
