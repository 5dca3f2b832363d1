"""Names for files that LAMMPS's input lines can hold.

LAMMPS replaces non-ASCII characters in a line, takes $ for a variable even in quotes, and cannot escape a quote within
quotes: a file whose full path has any of these cannot be named. Its folder is opened instead, and the file is named by
the open descriptor (/proc/self/fd/7/model.pt), which means the same file, in this process only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ubmd.errors import SimulationError

_PLAIN = re.compile(r"[\w./+=:,@~ -]+", re.ASCII)  # safe in double quotes
_HANDLES = Path("/proc/self/fd")


class Aliases:
    """Aliases of this process, which hold until they are closed."""

    def __init__(self) -> None:
        self._real: dict[int, Path] = {}

    def of(self, path: Path) -> Path:
        """A name of a file for LAMMPS: the path itself where possible; otherwise the file must exist.

        Raises:
            SimulationError: the folder cannot be opened, or this system does not name open handles.
        """
        if _PLAIN.fullmatch(str(path)):
            return path
        if not _PLAIN.fullmatch(path.name):
            return self._handle(path)
        return self._handle(path.parent) / path.name

    def real(self, text: str) -> str:
        """A message of LAMMPS with the files' own names."""

        def named(found: re.Match[str]) -> str:
            return str(self._real.get(int(found[1]), found[0]))

        return re.sub(rf"{_HANDLES}/(\d+)", named, text)

    def close(self) -> None:
        """Close the handles."""
        while self._real:
            os.close(self._real.popitem()[0])

    def _handle(self, path: Path) -> Path:
        known = [handle for handle, name in self._real.items() if name == path]
        try:
            handle = known[0] if known else os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SimulationError(f"{path} cannot be opened ({error.strerror}).") from None
        self._real[handle] = path
        alias = _HANDLES / str(handle)
        if not alias.exists():
            raise SimulationError(
                f"LAMMPS cannot read the name of {path} on this system: rename it, with ASCII letters only."
            )
        return alias
