"""Clipping by a norm that does not depend on how the product is split into factors."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers._batch import PairBatch


@torch.no_grad()
def clip_lora_grad_norm_(batches: list[PairBatch], max_norm: float, damping: float) -> Tensor:
    """Scale all gradients of the pairs by one number so that their natural norm is at most ``max_norm``.

    Returns:
        The norm before ``()``: ``√Σ(⟨gA, (BᵀB + δτI)⁻¹gA⟩ + ⟨gB, gB(AAᵀ + δτI)⁻¹⟩)``; 0 if there is no gradient.
    """
    if not batches:
        return torch.zeros(())
    device = batches[0].A[0].device
    parts = [_natural_norm_squared(batch, damping).to(device) for batch in batches]
    norm = torch.stack(parts).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for batch in batches:
        present = [p.grad for p in (*batch.A, *batch.B) if p.grad is not None]
        torch._foreach_mul_(present, factor.to(present[0].device, present[0].dtype))
    return norm


def _natural_norm_squared(batch: PairBatch, damping: float) -> Tensor:
    """``Σ ⟨gA, N_B gA⟩ + ⟨gB, gB N_A⟩`` over the batch, from the ``r × r`` Gram matrices of factors and gradients."""
    A, B = batch.stacked_factors(linalg.gram_dtype(batch.A[0].device))
    gA, gB = batch.stacked_gradients()
    P_B, P_A = (linalg.natural_inverse(K, damping).P for K in (linalg.gram_columns(B), linalg.gram_rows(A)))
    of_A, of_B = linalg.gram_rows(gA.to(A.dtype)), linalg.gram_columns(gB.to(B.dtype))
    return (P_B * of_A).sum() + (P_A * of_B).sum()
