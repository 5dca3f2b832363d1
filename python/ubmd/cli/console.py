"""Where tables are printed."""

from __future__ import annotations

import os

from rich.console import Console


def make_console() -> Console:
    """A console for tables; wide where there is no terminal, so that files and pipes get whole rows."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=140)
