"""Square roots and geometric means of small positive definite matrices, batched, where possible without eigenvalues.

Newton's iteration instead of ``eigh``: on a GPU ``eigh`` waits for the host and works one matrix at a time; this is a
fixed number of batched multiplications, which compiles and can be captured in a CUDA graph. The number follows from a
bound on the condition number, and damping gives that bound before any data are seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dreamlora import linalg


class Roots(NamedTuple):
    """``M^½`` and ``M^-½`` ``(..., r, r)``, symmetric, and where they could not be had (the identity there)."""

    root: Tensor
    inverse_root: Tensor
    failed: Tensor


# Largest condition number at which Newton's iteration is used in float32 and in float64: the error of the inverse root
# is about the unit roundoff times the condition number.
_NEWTON_LIMIT = {torch.float32: 1e4, torch.float64: 1e12}


def damped_condition(r: int, damping: float) -> float:
    """Bound on ``‖M‖_F / λ_min(M)`` for ``M = K/τ + δI`` of rank ``r``: ``r(1 + δ)/δ``, as ``tr(K/τ) = r``."""
    return r * (1 + damping) / damping if damping else math.inf


def spd_roots(M: Tensor, condition: float) -> Roots:
    """Symmetric ``M^½`` and ``M^-½`` of symmetric positive definite ``M`` ``(..., r, r)``.

    Up to a condition number of 1e12 by the coupled Newton-Schulz iteration, which is nothing but multiplications: no
    synchronisation with a GPU, no LAPACK call per matrix; the number of rounds follows from ``condition`` and not from
    the data. Beyond, and for ``condition=inf``, by eigenvalues in float64, floored at 1e-15 of the largest.

    Args:
        condition: an upper bound on ``‖M‖_F / λ_min(M)``; too small a value gives a wrong result.

    Source: Higham, Functions of Matrices (2008), equation 6.35.
    """
    dtype, device = M.dtype, M.device
    if condition > _NEWTON_LIMIT[torch.float32]:
        M = linalg.wide(M)
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    norm = torch.linalg.matrix_norm(M, keepdim=True)
    bad = ~(torch.isfinite(norm) & (norm > 0))
    M, norm = torch.where(bad, identity, M), torch.where(bad, math.sqrt(M.shape[-1]), norm)
    if condition <= _NEWTON_LIMIT[torch.float64]:
        Y, Z = M / norm, identity.expand_as(M)
        for _ in range(_newton_rounds(condition, torch.finfo(M.dtype).eps)):
            T = 1.5 * identity - 0.5 * (Z @ Y)
            Y, Z = Y @ T, T @ Z
        root, inverse_root = Y * norm.sqrt(), Z / norm.sqrt()
    else:
        values, vectors = torch.linalg.eigh(M)
        values = values.clamp_min(1e-15 * values[..., -1:])[..., None, :].sqrt()
        root, inverse_root = (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT
    # the cast comes first: there may be no float64 on the device
    root, inverse_root = (linalg.symmetric(x).to(dtype).to(device) for x in (root, inverse_root))
    return Roots(root, inverse_root, bad[..., 0, 0].to(device))


def _newton_rounds(condition: float, eps: float) -> int:
    """Rounds until the smallest eigenvalue ``x`` of ``ZY``, which each round turns into ``x(3 − x)²/4``, is 1."""
    x, rounds = 1 / condition, 0
    while 1 - x > eps:
        x, rounds = x * (3 - x) ** 2 / 4, rounds + 1
    return rounds + 1


def geometric_mean(KA: Tensor, KB: Tensor, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """``S = KA⁻¹ # KB``, the positive definite ``S`` with ``S KA S = KB``; ``S⁻¹``; and where both failed ``(...)``.

    With ``KA = LLᵀ``: ``S = L⁻ᵀ (Lᵀ KB L)^½ L⁻¹``. Refactoring ``(B S^-½, S^½ A)`` gives both factors the same Gram
    matrix, up to a rotation (RefLoRA, arXiv 2505.18877).

    Args:
        KA, KB: symmetric positive definite ``(..., r, r)``.
        condition: an upper bound on ``‖K‖_F / λ_min(K)`` of either.
    """
    dtype, device = KA.dtype, KA.device
    if condition**2 > _NEWTON_LIMIT[torch.float32]:
        KA, KB = linalg.wide(KA), linalg.wide(KB)
    L, L_inverse, failed = linalg.cholesky(KA)
    roots = spd_roots(linalg.symmetric(L.mT @ KB @ L), condition**2)
    S = L_inverse.mT @ roots.root @ L_inverse
    S_inverse = L @ roots.inverse_root @ L.mT
    failed = failed | roots.failed
    identity = torch.eye(KA.shape[-1], dtype=KA.dtype, device=KA.device)
    S, S_inverse = (torch.where(failed[..., None, None], identity, x) for x in (S, S_inverse))
    S, S_inverse = (linalg.symmetric(x).to(dtype).to(device) for x in (S, S_inverse))
    return S, S_inverse, failed.to(device)
