"""What the package says while it works (its loggers, from INFO on) goes to standard error; only programs show it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

PACKAGE = __name__.partition(".")[0]


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
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _BesideBars(logging.Handler):
    """Writes lines between progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        tqdm.write(self.format(record), file=sys.stderr)
