"""``dreamlora doctor``: torch is imported only after the flags are known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from dreamlora.commands.columns import tell
from dreamlora.commands.doctor.flags import parse


def main(argv: Sequence[str]) -> None:
    """Print what is found.

    Raises:
        UserError: a flag is wrong.
        SystemExit: with 1, if the training would not run.
    """
    config, training, options = parse(argv)
    from dreamlora.commands.doctor.diagnosis import diagnose
    from dreamlora.commands.doctor.words import lines_of

    found = diagnose(training, options)
    tell(found, lines_of, as_json=config.json)
    if not found["would_run"]:
        raise SystemExit(1)
