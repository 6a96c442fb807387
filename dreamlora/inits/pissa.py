"""PiSSA: the r largest singular triplets of the weight train, the rest stays frozen (arXiv 2404.02948; PEFT)."""

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
    """Settings of PiSSA.

    Raises:
        ValueError: a value is out of range.
    """

    niter: int = 0
    """0: the exact singular value decomposition; else PEFT's fast approximation with so many iterations, e.g. 16."""

    def __post_init__(self) -> None:
        if self.niter < 0:
            raise ValueError(f"niter must be at least 0 (got {self.niter})")


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """``B = U √(Σ/s)``, ``A = √(Σ/s) Vᵀ`` of the r largest singular values, by PEFT."""
    from dreamlora.inits._peft import peft_start

    kind = f"pissa_niter_{options.niter}" if options.niter else "pissa"
    for target in targets:
        yield peft_start(target, kind, least=target.rank)
