"""``dreamlora extract``: torch is imported only after the flags are known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from dreamlora.cli.parse import Program, parse
from dreamlora.commands.columns import tell
from dreamlora.commands.extract.flags import ExtractConfig


def main(argv: Sequence[str]) -> None:
    """Extract, and print the layers and where the LoRA is.

    Raises:
        UserError: a flag, file or model is wrong.
    """
    config = parse(ExtractConfig, argv, Program("dreamlora extract", positional="tuned"))
    from dreamlora.commands.extract.extract import extract
    from dreamlora.commands.extract.words import lines_of

    found = extract(config)
    tell(found, lines_of, as_json=config.json)
