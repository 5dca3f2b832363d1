"""The command ``ubmd``; tables, bars and lines on terminals are here only."""

INTERRUPTED = "Interrupted; rerun the same command to resume."
