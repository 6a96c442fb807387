"""LoRA-GA: the first step goes where full fine-tuning would go (arXiv 2407.05000)."""

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
    """Settings of LoRA-GA.

    Raises:
        ValueError: a value is out of range.
    """

    gamma: float = 16.0
    """The paper's γ: both factors are multiplied by m^(1/4)/√γ, m being the layer's outputs. Larger starts smaller."""
    draws: int = 128
    """Fixed (image, time, noise) draws that the gradient is averaged over; rounded up to whole batches."""
    iterations: int = 3
    """Power iterations of the gradient's singular value decomposition; all draws are passed 2 + 2·iterations times."""
    oversampling: float = 2.0
    """Width of that decomposition, as a multiple of the 2·rank singular vectors that are used."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma < float("inf"):
            raise ValueError(f"gamma must be above 0 (got {self.gamma})")
        for name, least in (("draws", 1), ("iterations", 0), ("oversampling", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least {least} (got {getattr(self, name)})")


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """``A₀ = c V[:, :r]ᵀ``, ``B₀ = c U[:, r:2r]``, ``c = m^(1/4)/√γ``, of the mean gradient ``Ḡ = U Σ Vᵀ``.

    The singular values are not used: the first step of gradient descent with rate η is then
    ``ΔW = −η s² (√m/γ) Ḡ₂ᵣ`` (Ḡ₂ᵣ: the best approximation of rank 2r), whatever the scale of the loss.
    """
    from dreamlora.inits._gradients import SketchPlan, mean_gradient_svd
    from dreamlora.inits._start import Start

    for target in targets:
        target.size("--init lora_ga", least=2 * target.rank)
    plan = SketchPlan(options.draws, options.iterations, options.oversampling)
    for target, (U, V) in zip(targets, mean_gradient_svd(targets, probe, plan), strict=True):
        r = target.rank
        factor = U.shape[0] ** 0.25 / options.gamma**0.5
        yield Start(factor * V[:, :r].mT, factor * U[:, r : 2 * r])
