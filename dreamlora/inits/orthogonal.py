"""Orthogonal: neither factor is zero, but B A is, as they use orthogonal halves of the rank (PEFT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamlora.inits._start import Probe, Start, Target

OFFSET: bool = False
RANK_MULTIPLE: int = 2


@dataclass(frozen=True)
class Options:
    """No settings."""


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """``A = Q_oddᵀ X/10``, ``B = Y Q_even/10`` with X, Y normal and Q a random rotation of the rank, by PEFT."""
    from dreamlora.inits._peft import peft_start

    for target in targets:
        yield peft_start(target, "orthogonal", least=1)
