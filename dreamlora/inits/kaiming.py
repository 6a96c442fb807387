"""A uniform within ±1/√n (n inputs), B = 0: PEFT's own default."""

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
    """PEFT's ``init_lora_weights=True``, drawn by the layer's name."""
    import torch

    from dreamlora.inits._start import Start

    for target in targets:
        down, up = target.shapes
        A = torch.nn.init.kaiming_uniform_(torch.empty(down), a=5**0.5, generator=target.generator())
        yield Start(A, torch.zeros(up))
