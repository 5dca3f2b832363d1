"""The files that a run depends on: their hashes tell whether it can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubmd.files import file_hash, named_file


def input_hashes(files: Mapping[str, Path], arguments: Mapping[str, Any], base: Path) -> dict[str, str]:
    """Hashes of the files that settings and arguments of the reference name, by key.

    Args:
        files: key of a setting -> the file that it names.
        arguments: ``reference.arguments``: texts in them may name files, too.
        base: folder that those are relative to.

    Raises:
        OSError: one of ``files`` is not there.
    """
    hashes = {key: file_hash(path) for key, path in files.items()}
    return hashes | _argument_hashes("reference.arguments", arguments, base)


def _argument_hashes(key: str, value: Any, base: Path) -> dict[str, str]:
    """Hashes of the files that arguments name, however nested, by key."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in _argument_hashes(f"{key}.{name}", item, base).items()}
    if isinstance(value, list | tuple):
        return {k: v for n, item in enumerate(value) for k, v in _argument_hashes(f"{key}.{n}", item, base).items()}
    path = named_file(base, value) if isinstance(value, str) else None
    return {} if path is None else {key: file_hash(path)}
