"""Which process may write a result, where several may be working on the same task without knowing of each other.

A worker on another machine that has lost its driver, or its connection to it, keeps working while the same task is
started again. Each process therefore works in a folder of its own beside the result, ``frames_003.<token>.attempt``,
and puts what it has made in place by renaming it out of there. Each new process removes the folders of the others: from
then on they can put nothing in place, and end when they notice.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from ubmd.errors import SimulationError
from ubmd.files import is_temporary, temporary_name

_SUFFIX = ".attempt"
_PROGRESS = "progress"
_GONE = (errno.ENOENT, errno.ESTALE)  # the second: removed on another machine


class TakenOver(SimulationError):
    """Another process has begun, or finished, the same task."""


@dataclass(frozen=True)
class Attempt:
    """One process's attempt at a result."""

    target: Path
    """the result"""
    folder: Path
    """of this process alone, on the file system of the result"""

    @classmethod
    def begin(cls, target: Path) -> Attempt:
        """Make the folder; this ends all attempts that others have begun at this target."""
        # Listed before the own folder is there: of two that begin at the same time, at least one continues.
        others = attempts(target)
        own = cls._new(target)
        own.folder.mkdir(parents=True)
        for other in others:
            _remove(other)
        return own

    @classmethod
    def take_over(cls, target: Path, content: Callable[[Path], int]) -> Attempt:
        """`begin`, with all that an earlier attempt has done: the one with most ``content``, then the newest."""
        others = attempts(target)
        own = cls._new(target)
        try:
            max(reversed(others), key=content).rename(own.folder)
        except (ValueError, OSError):  # there is none, or it has just ended
            own.folder.mkdir(parents=True)
        for other in others:
            _remove(other)
        return own

    @classmethod
    def _new(cls, target: Path) -> Attempt:
        return cls(target, target.with_name(f"{target.stem}.{secrets.token_hex(6)}{_SUFFIX}"))

    def check(self) -> None:
        """Raise TakenOver unless this attempt may continue."""
        try:
            self.folder.stat()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            name = self.target.name
            raise TakenOver(f"{name} was taken over by another process with the same task.") from None

    def report(self, steps: int) -> None:
        """Note the number of steps done, for `steps_so_far`; TakenOver as in `check`."""
        try:
            (self.folder / "steps").write_text(str(steps))
        except OSError:
            self.check()
            raise
        self.put("steps", self.folder / _PROGRESS)

    def put(self, name: str, target: Path) -> None:
        """Give a file of the folder its final name; TakenOver if the folder is gone."""
        try:
            (self.folder / name).replace(target)
        except OSError:
            self.check()
            raise

    def put_text(self, text: str, target: Path) -> None:
        """Write a file, by way of the folder; TakenOver as in `put`."""
        try:
            with (self.folder / "text").open("w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError:
            self.check()
            raise
        self.put("text", target)

    def remove(self, path: Path) -> None:
        """Remove an earlier result if there is one, by way of the folder; TakenOver as in `put`."""
        try:
            path.replace(self.folder / "removed")
        except OSError:
            self.check()
            if path.exists():
                raise

    def end(self) -> None:
        """Remove the folder; does nothing if it is gone."""
        _remove(self.folder)


def attempts(target: Path) -> list[Path]:
    """Folders of the attempts at a result, the newest last."""
    return sorted(_folders(target.parent, f"{escape(target.stem)}.*"), key=_age)


def end_attempts(target: Path) -> None:
    """Remove the folders of all attempts at a result: none of them can put anything in place any more."""
    for folder in attempts(target):
        _remove(folder)


def remove_leftovers(root: Path) -> None:
    """End all attempts below a folder, and remove the unfinished files that killed processes have left."""
    for parent, folders, files in os.walk(root):
        over = [name for name in folders if name.endswith(_SUFFIX) or is_temporary(name)]
        for name in over:
            folders.remove(name)
            _remove(Path(parent, name))
        for name in filter(is_temporary, files):
            with suppress(OSError):
                Path(parent, name).unlink()


def steps_so_far(target: Path) -> int | None:
    """Number of steps that the newest attempt at a result has done; None if it has not said, or there is none."""
    for folder in attempts(target)[-1:]:
        with suppress(OSError, ValueError):
            return int((folder / _PROGRESS).read_text())
    return None


def targets_in_work(folder: Path) -> list[str]:
    """Names without suffix of the results in a folder that have attempts, sorted."""
    return sorted({path.name.removesuffix(_SUFFIX).rpartition(".")[0] for path in _folders(folder)})


def _folders(parent: Path, names: str = "*") -> list[Path]:
    return [path for path in parent.glob(names + _SUFFIX) if path.is_dir()]


def _age(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # it has just been removed
        return 0.0


def _remove(folder: Path) -> None:
    # First under another name: while the files go, its owner must not put one of them in place.
    gone = temporary_name(folder)
    with suppress(OSError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
