"""A ~ N(0, 1/r²), B = 0: the start of diffusers' scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dreamlora.inits._start import Probe, Start, Target

OFFSET: bool = False
RANK_MULTIPLE: int = 1


@dataclass(frozen=True)
class Options:
    """No settings."""


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """PEFT's "gaussian", drawn by the layer's name."""
    import torch

    from dreamlora.inits._start import Start

    for target in targets:
        down, up = target.shapes
        A = torch.empty(down).normal_(std=1 / target.rank, generator=target.generator())
        yield Start(A, torch.zeros(up))
