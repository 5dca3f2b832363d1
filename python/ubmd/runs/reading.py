"""History and events of a run as records, for all readers.

`RunFolder.read_history` and `RunFolder.read_events` have what is in the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ubmd.errors import DataError
from ubmd.runs.event_records import Event, read_event
from ubmd.runs.folder import RunFolder
from ubmd.runs.records import IterationEntry, Record, RoundEntry

E = TypeVar("E", bound=Record)


def read_iterations(folder: RunFolder, newest: int = 0) -> list[IterationEntry]:
    """Entries of the finished iterations of an active-learning loop; see `Record.read` for files of other versions.

    Args:
        folder: of the run.
        newest: at most so many, the last ones; 0: all.

    Raises:
        DataError: the file is damaged.
    """
    return list(_records(IterationEntry, folder, folder.read_history()[-newest:]))


def read_rounds(folder: RunFolder) -> list[RoundEntry]:
    """Entries of the finished rounds of a dynamic run; see `Record.read` for files of other versions.

    Raises:
        DataError: the file is damaged.
    """
    return list(_records(RoundEntry, folder, folder.read_history()))


def newest_rounds(folder: RunFolder) -> Iterator[RoundEntry]:
    """`read_rounds` from the last one back, each made when it is needed: a run may have thousands."""
    return _records(RoundEntry, folder, reversed(folder.read_history()))


def read_events(folder: RunFolder) -> Iterator[Event]:
    """All events, one at a time: there may be many. What a kill or a damage left of others is left out."""
    for values in folder.each_event():
        try:
            event = read_event(values)
        except DataError:
            continue
        yield event


def _records(kind: type[E], folder: RunFolder, entries: Iterable[dict[str, Any]]) -> Iterator[E]:
    try:
        for entry in entries:
            yield kind.read(entry)
    except DataError as error:
        raise folder.damaged_history(str(error)) from None
