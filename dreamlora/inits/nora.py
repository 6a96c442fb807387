"""NoRA: a Nyström sketch of the layer's own weight (arXiv 2410.18965)."""

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
    """Settings of NoRA.

    Raises:
        ValueError: a value is out of range.
    """

    sigma: float = 0.02
    """Size of the sketch: the rows of A have a norm of about sigma times that of W0, divided by alpha/rank."""
    orthonormalize: bool = False
    """Make the rows of A orthogonal and equally long: their span stays, the spread of W0's spectrum goes."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma must be above 0 (got {self.sigma})")


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """``A = (σ/s) Ω W₀`` with Ω ``(r, m)`` standard normal, ``B = 0``; W₀ is not changed."""
    import torch

    from dreamlora import linalg
    from dreamlora.inits._start import Start

    for target in targets:
        m, _ = target.size("--init nora", least=target.rank)
        weight = linalg.decomposable(target.weight())
        sketch = torch.randn(target.rank, m, generator=target.generator()).to(weight.device)
        A = options.sigma / target.scaling * (sketch @ weight)
        if options.orthonormalize:
            A = torch.linalg.qr(A.mT).Q.mT * (A.norm() / target.rank**0.5)
        yield Start(A, torch.zeros(m, target.rank))
