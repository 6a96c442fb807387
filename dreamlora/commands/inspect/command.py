"""``dreamlora inspect``: no torch at any time."""

from __future__ import annotations

from collections.abc import Sequence

from dreamlora.cli.parse import Program, parse
from dreamlora.commands.columns import tell
from dreamlora.commands.inspect.flags import InspectConfig


def main(argv: Sequence[str]) -> None:
    """Print what is found.

    Raises:
        UserError: a flag is wrong, or there is no file that can be read.
    """
    config = parse(InspectConfig, argv, Program("dreamlora inspect", positional="file"))
    from dreamlora.commands.inspect.findings import findings
    from dreamlora.commands.inspect.words import lines_of

    found = findings(config.file)
    tell(found, lines_of, as_json=config.json)
