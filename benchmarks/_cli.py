"""How every benchmark begins: what a person can mend is told in one message, with dreamlora's own exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from dreamlora.cli.parse import run


def start(main: Callable[[], object]) -> NoReturn:
    """Run a benchmark and end the process: 2 after a wrong flag or value, 1 where the system refused."""
    sys.exit(run(lambda _: main(), sys.argv[1:]))
