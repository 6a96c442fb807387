"""LoRA pairs of one shape, stacked for batched arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dreamlora.optimizers._kernels import compute_dtype

Moves = list[tuple[Tensor, Tensor]]
"""Parameters and the directions, in the same shape, along which they move (downhill is against it)."""


@dataclass(frozen=True)
class PairBatch:
    """``b`` pairs of one shape, dtype, device and scaling; ``b`` is bounded, and with it the memory of temporaries.

    Attributes:
        A: parameters ``(r, n)`` or ``(r, c, *kernel)``.
        B: parameters ``(m, r)`` or ``(m, r, 1, ...)``.
        scalings: ``s`` of every pair, all alike.
    """

    A: list[Tensor]
    B: list[Tensor]
    scalings: list[float]

    def stacked_factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A ``(b, r, n)`` and B ``(b, m, r)``, in at least float32 (or ``dtype``); a single pair may not be copied."""
        return stack(self.A, dtype), stack(self.B, dtype)

    def stacked_gradients(self) -> tuple[Tensor, Tensor]:
        """gA ``(b, r, n)`` and gB ``(b, m, r)``, in at least float32; a missing gradient counts as zero."""
        gA, gB = ([torch.zeros_like(p) if p.grad is None else p.grad for p in side] for side in (self.A, self.B))
        return stack(gA), stack(gB)

    def moves(self, dA: Tensor, dB: Tensor) -> tuple[Moves, Moves]:
        """Stacked ``dA`` ``(b, r, n)`` and ``dB`` ``(b, m, r)`` by parameter, for those that have a gradient."""
        return moves_of(self.A, dA), moves_of(self.B, dB)


def stack(tensors: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Tensors of one shape ``(k, ...)`` as ``(b, k, l)``, in at least float32 (or ``dtype``)."""
    stacked = (tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)).flatten(2)
    return stacked.to(dtype or compute_dtype(stacked.dtype))


def moves_of(params: list[Tensor], stacked: Tensor) -> Moves:
    """Parts of ``stacked`` ``(b, k, l)`` by parameter and in its shape, for those that have a gradient."""
    directions = stacked.reshape(len(params), *params[0].shape).unbind()
    return [(p, d) for p, d in zip(params, directions, strict=True) if p.grad is not None]
