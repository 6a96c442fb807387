"""``dreamlora merge``: torch is imported only after the flags are known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from dreamlora.cli.parse import Program, parse
from dreamlora.commands.columns import tell
from dreamlora.commands.merge.flags import MergeConfig


def main(argv: Sequence[str]) -> None:
    """Merge, and print what was merged and where it is.

    Raises:
        UserError: a flag, file or model is wrong.
    """
    config = parse(MergeConfig, argv, Program("dreamlora merge", positional="lora"))
    from dreamlora.commands.merge.merge import merge
    from dreamlora.commands.merge.words import lines_of

    found = merge(config)
    tell(found, lines_of, as_json=config.json)
