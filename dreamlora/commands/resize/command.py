"""``dreamlora resize``: torch is imported only after the flags are known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from dreamlora.cli.parse import Program, parse
from dreamlora.commands.columns import tell
from dreamlora.commands.resize.flags import ResizeConfig


def main(argv: Sequence[str]) -> None:
    """Resize, and print the layers and where the LoRA is.

    Raises:
        UserError: a flag, file or model is wrong.
    """
    config = parse(ResizeConfig, argv, Program("dreamlora resize", positional="lora"))
    from dreamlora.commands.resize.resize import resize
    from dreamlora.commands.resize.words import lines_of

    found = resize(config)
    tell(found, lines_of, as_json=config.json)
