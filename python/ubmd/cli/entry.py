"""What the ``ubmd`` command runs first: the imports take a second or more, and Ctrl-C may come in between."""

from __future__ import annotations

import sys
from io import TextIOWrapper

INTERRUPTED = "Interrupted; the same command goes on where it was."


def main() -> None:
    """Run the command line; Ctrl-C ends it with a sentence and status 130, whenever it comes."""
    for stream in (sys.stdout, sys.stderr):  # letters that the terminal's locale lacks, such as Å, must not end a run
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        from ubmd.cli.main import app

        app()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None
