"""What the ``ubmd`` command runs first: the imports take a second or more, and Ctrl-C may come in between."""

from __future__ import annotations

import sys

INTERRUPTED = "Interrupted; the same command goes on where it was."


def main() -> None:
    """Run the command line; Ctrl-C ends it with a sentence and status 130, whenever it comes."""
    try:
        from ubmd.cli.main import app

        app()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None
