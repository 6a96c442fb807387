"""``dreamlora export``: torch is imported only after the flags are known to be right."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dreamlora.cli.parse import Program, parse
from dreamlora.commands.export.flags import ExportConfig
from dreamlora.escapes import one_line


def main(argv: Sequence[str]) -> None:
    """Write the file that the command line asks for and print where it is.

    Raises:
        UserError: a flag, file or model is wrong, or the format cannot hold the LoRA.
    """
    config = parse(ExportConfig, argv, Program("dreamlora export", positional="lora"))
    from dreamlora.commands.export.export import export

    sys.stdout.write(f"{one_line(str(export(config)))}\n")
