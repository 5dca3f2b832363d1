"""Where tables are printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from ubmd.errors import UbmdError


def make_console() -> Console:
    """A console for tables; wide where there is no terminal, so that files and pipes get whole rows."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=140)


def shown(text: str) -> str:
    """Text of a file as a cell of a table: no markup, and no control characters, which could steer the terminal."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn an error meant for the user into its sentence on stderr and exit status 1."""
    try:
        yield
    except UbmdError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def print_taken(sentences: Sequence[str], console: Console) -> None:
    """Where the labels of files were taken from, one line per file."""
    for sentence in sentences:
        console.print(f"Labels of {shown(sentence)}", soft_wrap=True, highlight=False)


def print_remarks(remarks: Sequence[str]) -> None:
    """Remarks on labels, on stderr like errors, so that JSON stays JSON."""
    for sentence in remarks:
        print(f"Remark: {sentence}", file=sys.stderr)
