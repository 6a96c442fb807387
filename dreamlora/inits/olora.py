"""OLoRA: the first r columns of Q and rows of R of the weight's QR decomposition train (arXiv 2406.01775; PEFT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamlora.inits._start import Probe, Start, Target

OFFSET: bool = True
RANK_MULTIPLE: int = 1


@dataclass(frozen=True)
class Options:
    """No settings."""


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """``B = Q[:, :r]``, ``A = R[:r]``, by PEFT."""
    from dreamlora.inits._peft import peft_start

    for target in targets:
        yield peft_start(target, "olora", least=target.rank)
