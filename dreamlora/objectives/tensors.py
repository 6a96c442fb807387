"""What the objectives share: numbers of samples beside latents, fractions as indices."""

from __future__ import annotations

from torch import Tensor


def like(values: Tensor, latents: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, 1, 1]`` in the latents' precision."""
    return values.to(latents.dtype).reshape(-1, *[1] * (latents.dim() - 1))


def index(fractions: Tensor, length: int) -> Tensor:
    """Fractions of [0, 1) as int64 indices below ``length``; the clamp is for 1.0, which "mode" can give."""
    return (fractions * length).long().clamp_(0, length - 1)
