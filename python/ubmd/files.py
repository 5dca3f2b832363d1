"""Files that are written whole or not at all, and whether they can be written where they are wanted."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ubmd.errors import SettingsError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` once it is complete and on disk, or leaves no trace.

    A reader sees the old or the new content, never a part, also after a power cut or with several writers.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside a file that no other process, here or on another machine, will choose."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name was on its way, or on its way out, when its process was killed."""
    return _TEMPORARY.fullmatch(name) is not None


def check_outputs(folder: Path, names: Iterable[str], key: str) -> None:
    """Make a folder (with those above it), and see that files of these names can be written in it.

    Args:
        folder: where.
        names: of the files.
        key: the setting or option that says where, for the message.

    Raises:
        SettingsError: they cannot.
    """
    check_name(folder, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(f"{key}: {folder} cannot be made or written ({why(error)}); name another one.") from None
    for name in names:
        if (folder / name).is_dir():
            raise SettingsError(
                f"{key}: a file {folder / name} is to be written, but there is a folder of that name; move it away."
            )


def check_name(path: Path, key: str) -> None:
    """SettingsError if a full name is no text: neither settings nor model files could be written there."""
    name = os.fsencode(path.absolute())
    try:
        name.decode()
        str(path.absolute()).encode()
    except UnicodeError:
        raise SettingsError(
            f"{key}: the name of {name.decode(errors='replace')} cannot be read as text in this locale; rename the "
            "folder, or set LC_ALL=C.UTF-8."
        ) from None


def why(error: OSError) -> str:
    """The reason for which a folder cannot be made or written."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "there is a file in the way"
    return (error.strerror or str(error)).lower()
