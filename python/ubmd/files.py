"""Files that are written whole or not at all, and whether they can be written where they are needed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from ubmd.errors import SettingsError, StorageError
from ubmd.faults import FULL
from ubmd.valid_json import parse_json

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
    """Whether this is the name of a file or folder that was being written, or removed, when its process was killed."""
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
    """SettingsError if a full name is not valid text: neither settings nor model files could be written there."""
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


_PROBE_BYTES = 1 << 16


def seal(path: Path, key: str) -> None:
    """Note beside a finished file what it was made from, and its hash."""
    write_json(_seal(path), {"key": key, "sha256": file_hash(path)})


def is_sealed(path: Path, key: str) -> bool:
    """Whether a file is finished, undamaged, and made with this key."""
    note = read_json_if_whole(_seal(path))
    return note is not None and path.exists() and note["key"] == key and note["sha256"] == file_hash(path)


def is_intact(path: Path) -> bool:
    """Whether a sealed file is undamaged, whatever it was made from."""
    note = read_json_if_whole(_seal(path))
    return note is not None and path.exists() and note["sha256"] == file_hash(path)


def _seal(path: Path) -> Path:
    return path.with_name(f".{path.name}.seal")


def read_json_if_whole(path: Path) -> Any:
    """The value in a JSON file; None if there is none, or a damaged one."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def move_aside(path: Path, folder: Path, name: str = "") -> Path | None:
    """Move a file or folder into ``folder``, never over another one; returns where it is now (None: there is none)."""
    if not path.exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    target = folder / (name or f"{path.name}.{stamp}")
    for number in itertools.count(1):
        if not target.exists():
            break
        target = folder / f"{name or path.name}.{stamp}.{number}"
    path.rename(target)
    return target


def keep_copy(path: Path, folder: Path) -> None:
    """Keep a copy of a file in ``folder``, under a dated name."""
    scratch = temporary_name(path)
    copy_file(path, scratch)
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S-%f")
    move_aside(scratch, folder, f"{path.stem}.{stamp}{path.suffix}")


def check_space(folder: Path) -> None:
    """StorageError if not even a small file can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:  # without a name: nothing is left if this is killed
            handle.write(b"\0" * _PROBE_BYTES)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        if error.errno in FULL:
            raise full_disk(folder) from error
        raise


def full_disk(folder: Path) -> StorageError:
    """The error that ends a run on a full disk."""
    return StorageError(
        f"There is no space left for {folder} (disk, quota or limit on file sizes); no finished work is lost: "
        "free some, then rerun the same command to resume."
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """JSON as our files have it."""
    return json.dumps(value, indent=1) + "\n"


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return parse_json(path.read_text(encoding="utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; the target is replaced in one step."""
    with replacing(target) as handle:
        handle.write(source.read_bytes())


def append_text(path: Path, text: str) -> None:
    """Append to a file (made if missing); the text is on disk when this returns."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    if is_new:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def named_file(base: Path, text: str) -> Path | None:
    """The file under ``base`` that a text names; None if it names none, as a long text or one of several lines."""
    try:
        path = base / text
        return path if text and path.is_file() else None
    except (OSError, ValueError):  # too long for a name, or with a null character
        return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, or of the names and contents of all files in a folder."""
    if path.is_dir():
        files = {str(file.relative_to(path)): file_hash(file) for file in path.rglob("*") if file.is_file()}
        return content_hash(files)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content_hash(value: Any) -> str:
    """SHA-256 of a value as JSON; pass no paths, a run may move."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
