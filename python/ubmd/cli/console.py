"""Where tables are printed."""

from __future__ import annotations

import os

from rich.console import Console
from rich.markup import escape


def make_console() -> Console:
    """A console for tables; wide where there is no terminal, so that files and pipes get whole rows."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=140)


def shown(text: str) -> str:
    """Text of a file as a cell of a table: no markup, and no control characters, which could steer the terminal."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))
