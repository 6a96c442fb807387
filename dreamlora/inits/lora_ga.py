"""LoRA-GA: the first step goes where full fine-tuning would go (arXiv 2407.05000)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dreamlora.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

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
    norm_clip: bool = False
    """The authors' clip: a start shrinks until the largest entry of s·B₀A₀ is no larger than that of the weight."""

    def __post_init__(self) -> None:
        if not 0 < self.gamma < float("inf"):
            raise ValueError(f"gamma must be above 0 (got {self.gamma})")
        for name, least in (("draws", 1), ("iterations", 0), ("oversampling", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least {least} (got {getattr(self, name)})")
        if not isinstance(self.norm_clip, bool):  # "false" would be true
            raise ValueError(f"norm_clip must be true or false (got {self.norm_clip!r})")


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """``A₀ = c V[:, :r]ᵀ``, ``B₀ = c U[:, r:2r]``, ``c = m^(1/4)/√γ``, of the mean gradient ``Ḡ = U Σ Vᵀ``.

    The singular values are not used: the first step of gradient descent with rate η is then
    ``ΔW = −η s² (√m/γ) Ḡ₂ᵣ`` (Ḡ₂ᵣ: the best approximation of rank 2r), whatever the scale of the loss.

    Raises:
        UserError: a layer is too small; or ``norm_clip`` and its weight is zero.
    """
    from dreamlora.inits._gradients import SketchPlan, mean_gradient_svd
    from dreamlora.inits._start import Start

    for target in targets:
        target.size("--init lora_ga", least=2 * target.rank)
    limits = [_largest_entry(target) / abs(target.scaling) if options.norm_clip else None for target in targets]
    plan = SketchPlan(options.draws, options.iterations, options.oversampling)
    for target, limit, (U, V) in zip(targets, limits, mean_gradient_svd(targets, probe, plan), strict=True):
        r = target.rank
        factor = U.shape[0] ** 0.25 / options.gamma**0.5
        A, B = factor * V[:, :r].mT, factor * U[:, r : 2 * r]
        yield Start(A, B) if limit is None else Start(*clipped(A, B, limit))


def clipped(A: Tensor, B: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """A ``(r, n)`` and B ``(m, r)``, shrunk alike until no entry of B A is larger than ``limit``."""
    share = min(1.0, limit / float((B @ A).abs().max())) ** 0.5
    return share * A, share * B


def _largest_entry(target: Target) -> float:
    largest = float(target.weight().abs().max())
    if not largest:
        raise UserError(
            f"--init_args norm_clip: the weight of {target.name} is zero, so its start would be too, and would never "
            "train. Leave the layer out of --lora_layers, or norm_clip out of --init_args"
        )
    return largest
