"""The command ``ubmd``; tables, bars and lines on terminals are here only."""

INTERRUPTED = "Interrupted; the same command goes on where it was."
