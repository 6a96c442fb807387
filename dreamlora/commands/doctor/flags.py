"""``dreamlora doctor``: the flags of its own, and those of the training beside them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dreamlora.cli.declared import options_of
from dreamlora.cli.given import divided, flag_in
from dreamlora.cli.parse import Program, parse_run
from dreamlora.cli.parse import parse as parse_flags
from dreamlora.config import PROGRAMS, RunConfig

PROGRAM = "dreamlora doctor"


@dataclass(frozen=True)
class DoctorConfig:
    """Say what a training would do, need and stumble over, without loading a weight: dreamlora doctor <model> [flags of
    the training]; see dreamlora dreambooth --help for these."""

    program: Literal["dreambooth", "text-to-image"] = "dreambooth"
    """What is to be trained: dreamlora dreambooth or dreamlora text-to-image."""
    json: bool = False
    """Print JSON instead of text."""


def parse(argv: Sequence[str]) -> tuple[DoctorConfig, RunConfig, Any]:
    """The doctor's own options, those of the training, and the optimizer's own.

    Raises:
        UserError: a flag, value or combination is wrong.
    """
    words = list(argv)
    if words and flag_in(words[0]) is None:
        words.insert(0, "--pretrained_model_name_or_path")
    mine, training = divided(words, options_of(DoctorConfig))
    config = parse_flags(DoctorConfig, mine, Program(PROGRAM))
    return config, *parse_run(training, PROGRAMS[config.program], PROGRAM)
