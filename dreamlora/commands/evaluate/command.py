"""``dreamlora evaluate``: torch is imported only after the flags are known to be right."""

from __future__ import annotations

from collections.abc import Sequence

from dreamlora.cli.parse import Program, parse
from dreamlora.commands.evaluate.flags import EvaluateConfig


def main(argv: Sequence[str]) -> None:
    """Measure what the command line asks for; print the table and where metrics.json is.

    Raises:
        UserError: a flag, file or model is wrong.
    """
    config = parse(EvaluateConfig, argv, Program("dreamlora evaluate", positional="lora"))
    from dreamlora.commands.evaluate.evaluate import evaluate_loras

    evaluate_loras(config)
