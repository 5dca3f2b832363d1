"""What the ``ubmd`` command runs first: the imports take a second or more, and Ctrl-C may come in between."""

from __future__ import annotations

import errno
import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import Any

from ubmd.cli import INTERRUPTED

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: signal.Signals | None = None


def main() -> None:
    """Run the command line.

    Ctrl-C ends it with a message and exit status 130 at any time; so do SIGTERM (143), and SIGHUP (129) when the
    terminal closes, except one that was ignored at the start (``nohup``, a background job of a script).
    """
    for name in _ENDING:
        if signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, _interrupt)
    sys.stdout = sys.__stdout__ = _lasting(sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _lasting(sys.stderr)  # type: ignore[misc]
    try:
        from ubmd.cli.main import app

        app()
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(128 + (_received or signal.SIGINT)) from None
    except SystemExit:
        if _received is not None and _handles_interrupt(sys.exception()):
            raise SystemExit(128 + _received) from None
        raise
    finally:
        for name in _ENDING:  # one more while Python ends would show a traceback
            if signal.getsignal(name) is _interrupt:
                signal.signal(name, signal.SIG_IGN if _received is not None else signal.SIG_DFL)


def _interrupt(number: int, _: FrameType | None) -> None:
    """Raise KeyboardInterrupt, unless one is being handled: the clean-up must be completed."""
    global _received
    if _handles_interrupt(sys.exception()):
        return
    _received = signal.Signals(number)
    raise KeyboardInterrupt("interrupted" if number == signal.SIGINT else f"ended by {_received.name}")


def _handles_interrupt(error: BaseException | None) -> bool:
    """Whether an error is a KeyboardInterrupt, or was raised while one was handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


class _LastingStream(TextIOWrapper):
    """A stream whose terminal may vanish: later output is then discarded, and the run continues."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """Discard all output from now on; other errors, such as a full disk, and ``| head`` are raised as usual."""
        left_alone = _received is not None or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        if error.errno != errno.EIO and not (error.errno == errno.EPIPE and left_alone):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _lasting(stream: Any) -> Any:
    """The same stream; characters that the terminal's locale lacks, such as Å, must not end a run either."""
    if not isinstance(stream, TextIOWrapper):
        return stream
    encoding, by_line, at_once = stream.encoding, stream.line_buffering, stream.write_through
    return _LastingStream(stream.detach(), encoding, "replace", line_buffering=by_line, write_through=at_once)
