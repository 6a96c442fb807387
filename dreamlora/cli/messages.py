"""What the package says while it works (its loggers, from INFO on) goes to standard error; only programs show it.

Neither a reader who has gone nor a terminal that cannot show a name ends what is under way.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dreamlora import escapes
from dreamlora.credentials import masked
from dreamlora.errors import WriteError
from dreamlora.interrupts import PIPE, request

PACKAGE = __name__.partition(".")[0]
_BAR = re.compile(r"\r|(?:\x1b\[A)+$")
"""What a progress bar writes before its text, to begin its line anew, and alone, to go to the lines above."""


@contextmanager
def console_messages() -> Iterator[None]:
    """Show the messages of this package, each once: the root's handlers, if there are any, do not get them.

    Of several processes the first one shows all, the others their warnings alone, with their number: what one of them
    does in its share of the work is nobody else's.
    """
    rank = int(os.environ.get("RANK", "0"))
    handler = _BesideBars(logging.WARNING if rank else logging.INFO)
    handler.setFormatter(logging.Formatter(f"process {rank}: %(message)s" if rank else "%(message)s"))
    logger = logging.getLogger(PACKAGE)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it tells what a CPU lacks
    _open_closed_streams()
    try:
        with _tolerant("stdout"), _tolerant("stderr"):
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _BesideBars(logging.Handler):
    """Writes lines between progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        tqdm.write(escapes.message(masked(self.format(record))), file=sys.stderr)


def _shown(text: str) -> str:
    bar = _BAR.match(text)
    return escapes.visible(text) if bar is None else bar[0] + escapes.one_line(text[bar.end() :])


def _open_closed_streams() -> None:
    """Put nothing in the place of a stream that the caller has closed (``>&-``), or that Windows does not give.

    In this order each takes its own number again, which else the next file would get: libraries write to 2 unasked.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until the program ends


@contextmanager
def _tolerant(name: str) -> Iterator[None]:
    stream = getattr(sys, name)
    ours = _Tolerant(stream, results=name == "stdout")
    setattr(sys, name, ours)
    try:
        yield
    finally:
        if getattr(sys, name) is ours:
            setattr(sys, name, stream)
        ours.end()


@contextmanager
def work_beside_output() -> Iterator[None]:
    """For work whose result are files, such as a training: it goes on whether or not its output can be written."""
    stream: Any = sys.stdout
    before = getattr(stream, "results", None)
    if before:
        stream.results = False
    try:
        yield
    finally:
        if before:
            stream.results = before


class _Tolerant:
    """A stream that says what its encoding lacks in another way, and whose failures end nothing but what it is for.

    If its reader has gone, a program that was called for what it prints ends there, quietly. All else goes on, and what
    it says goes nowhere: of other output nothing is said if it cannot be written, for there is no place to say it.

    Args:
        stream: to write to.
        results: whether it is what the program was called for.

    Attributes:
        results: as given.
    """

    def __init__(self, stream: TextIO, results: bool) -> None:
        self._stream = stream
        self.results = results
        with contextlib.suppress(AttributeError, ValueError):  # not every stream has an encoding
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's.

        Raises:
            Interrupted: the reader has gone, and nothing is under way that is to be finished first.
            WriteError: results cannot be written.
        """
        try:
            self._stream.write(_shown(text))
        except OSError as error:
            self._fail(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As the stream's; raises what ``write`` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As the stream's; raises what ``write`` does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def end(self) -> None:
        """Leave nothing to be written while Python exits, which would complain, and change the exit status."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _fail(self, error: OSError) -> None:
        gone = error.errno == errno.EPIPE or (os.name == "nt" and error.errno == errno.EINVAL)
        if gone or self.results:
            self._drop()
        if gone and self.results:
            request(PIPE)
        elif self.results:
            raise WriteError.of(Path("the output"), error, "Mend that, and start again") from error

    def _drop(self) -> None:
        """From now on all goes nowhere."""
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
