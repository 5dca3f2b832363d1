"""Errors that a user can act on, and what is shown of the errors of other programs."""

from __future__ import annotations

import re
import unicodedata

_LONGEST = 500  # characters of a message that are kept
_LOOKED_AT = 20 * _LONGEST  # characters of a message that are looked at: one may hold the whole output of a program
# Colours, movements of the cursor and titles of windows: what a program writes for a terminal.
_TERMINAL = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")


class UbmdError(Exception):
    """Base of all errors with a message meant for the user: one clear sentence that says what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


class DataError(UbmdError):
    """Structures or labels are missing, malformed, not finite, or in the wrong units."""


class SettingsError(UbmdError):
    """A settings file has an unknown key, a wrong type or a value outside its range."""


class ArgumentError(SettingsError, TypeError):
    """An unknown keyword in a call from Python; Python's own error for that is a TypeError, so this is one, too."""


class ModelError(UbmdError):
    """A model file is missing, corrupt, of another format, or lacks something that is needed."""


class LabelError(UbmdError):
    """A reference calculation failed, did not converge, or returned an implausible label."""


class SimulationError(UbmdError):
    """LAMMPS could not be started or an MD run ended with an error."""


class TrainingError(UbmdError):
    """A training diverged, or a checkpoint belongs to another training."""


class StorageError(UbmdError):
    """A disk, a quota or a limit on file sizes is full: nothing is lost; with space, the same command resumes."""


class MachineError(UbmdError):
    """The machine or cluster failed, not the calculation; nothing is lost: try again later, or after a repair."""


def one_line(text: object) -> str:
    """A text of another program as one line for a message, a table or a file.

    Control characters, colours and line breaks are removed; more than 500 characters are cut, and the line says so.
    """
    whole = text if isinstance(text, str) else _as_text(text)
    shown = _TERMINAL.sub("", whole[:_LOOKED_AT])
    shown = "".join(c if c.isspace() or unicodedata.category(c)[0] != "C" else "" for c in shown)
    words = " ".join(shown.split())
    if len(words) <= _LONGEST and len(whole) <= _LOOKED_AT:
        return words
    return f"{words[:_LONGEST].rstrip()} … (cut: {len(whole):,} characters)".lstrip()


def describe(error: BaseException) -> str:
    """'Type: message' of any error as one line; the type alone if it has no message."""
    message = one_line(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _as_text(value: object) -> str:
    try:
        return str(value)
    except BaseException:  # a foreign __str__ may do anything, sys.exit included
        return "(its message cannot be shown)"
