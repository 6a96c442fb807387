"""``dreamlora sample``: torch is imported only after the flags are known to be right."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dreamlora.cli.parse import Program, parse
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.escapes import one_line


def main(argv: Sequence[str]) -> None:
    """Draw what the command line asks for and print where the grid is.

    Raises:
        UserError: a flag, file or model is wrong.
    """
    config = parse(SampleConfig, argv, Program("dreamlora sample", positional="lora"))
    from dreamlora.commands.sample.draw import sample_loras

    sys.stdout.write(f"{one_line(str(sample_loras(config)))}\n")
