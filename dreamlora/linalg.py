"""Small dense linear algebra for LoRA factors: pure, batched over leading dimensions, without host synchronisation.

Notation: ``A`` is ``(..., r, n)``, ``B`` is ``(..., m, r)``, ``K`` is a Gram matrix ``(..., r, r)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TAU_MIN = 1e-30
"""A Gram matrix whose mean eigenvalue is at most this counts as zero (a factor that has not left its zero start)."""


class Inverse(NamedTuple):
    """A batch of inverses and where they could not be had.

    Attributes:
        P: ``(..., r, r)``; the identity (times the method's scale) for items that failed.
        failed: ``(...)`` bool; the matrix was not positive definite in this precision, or not finite.
    """

    P: Tensor
    failed: Tensor


DampedInverse = Callable[[Tensor, float], Inverse]
"""``(K, damping) -> Inverse``."""


def gram_rows(A: Tensor) -> Tensor:
    """``A Aᵀ``: ``(..., r, n) -> (..., r, r)``."""
    return A @ A.mT


def gram_columns(B: Tensor) -> Tensor:
    """``Bᵀ B``: ``(..., m, r) -> (..., r, r)``."""
    return B.mT @ B


def mean_eigenvalue(K: Tensor) -> Tensor:
    """``τ = tr(K)/r``: ``(..., r, r) -> (..., 1, 1)``."""
    return K.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def spd_inverse(M: Tensor) -> Inverse:
    """``M⁻¹`` of symmetric positive definite ``M`` ``(..., r, r)`` by Cholesky; the identity where that fails.

    An explicit inverse: at r <= 64 forming it and multiplying is 2-3 times cheaper than solving against wide factors.
    """
    L, info = torch.linalg.cholesky_ex(M)
    failed = info != 0
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    L = torch.where(failed[..., None, None], identity, L)
    L_inverse = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    return Inverse(L_inverse.mT @ L_inverse, failed)


def normalised_inverse(K: Tensor, damping: float) -> Inverse:
    """``(K/τ + δI)⁻¹`` with ``τ = tr(K)/r``; the identity where ``τ`` is zero.

    Its eigenvalues lie in ``[1/(r + δ), 1/δ]``, so it changes a gradient's direction and keeps its magnitude.
    ``K -> cK`` changes nothing. For methods that normalise their step (Adam).

    Args:
        K: Gram matrices ``(..., r, r)``.
        damping: ``δ >= 0``, a fraction of the mean eigenvalue.
    """
    P, failed, _ = _relative(K, damping)
    return Inverse(P, failed)


def natural_inverse(K: Tensor, damping: float) -> Inverse:
    """``(K + δτI)⁻¹`` with ``τ = tr(K)/r``; the identity where ``τ`` is zero.

    The natural (Gauss-Newton) scale: ``K -> cK`` divides it by ``c``. For methods that take the gradient as is (SGD).

    Args:
        K: Gram matrices ``(..., r, r)``.
        damping: ``δ >= 0``, a fraction of the mean eigenvalue.
    """
    P, failed, tau = _relative(K, damping)
    return Inverse(P / tau, failed)


def absolute_inverse(K: Tensor, damping: float) -> Inverse:
    """``(K + λI)⁻¹``: the published form, whose ``λ`` has the unit of ``K`` and so depends on initialisation and width.

    Args:
        K: Gram matrices ``(..., r, r)``.
        damping: ``λ >= 0``.
    """
    return spd_inverse(K + damping * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device))


def _relative(K: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(K/τ + δI)⁻¹``, where it failed, and ``τ`` (1 in place of zero)."""
    tau = mean_eigenvalue(K)
    zero = tau <= TAU_MIN
    tau = torch.where(zero, 1.0, tau)
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    normalised = torch.where(zero, identity, K / tau + damping * identity)
    P, failed = spd_inverse(normalised)
    return P, failed, tau


def common_rank_inverse(
    grams: list[Tensor], inverse: DampedInverse, damping: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Inverses of Gram batches of many layers with one factorisation per rank, device and dtype.

    Args:
        grams: ``(b_i, r_i, r_i)``.

    Returns:
        inverses ``(b_i, r_i, r_i)`` in the order given, and the number of failures ``()`` of every factorisation.
    """
    alike: dict[object, list[int]] = {}
    for i, K in enumerate(grams):
        alike.setdefault((K.shape[-1], K.device, K.dtype), []).append(i)
    inverses, failures = list(grams), []
    for members in alike.values():
        P, failed = inverse(torch.cat([grams[i] for i in members]), damping)
        failures.append(failed.sum())
        for i, part in zip(members, P.split([grams[i].shape[0] for i in members]), strict=True):
            inverses[i] = part
    return inverses, failures


__all__ = [
    "TAU_MIN",
    "DampedInverse",
    "Inverse",
    "absolute_inverse",
    "common_rank_inverse",
    "gram_columns",
    "gram_rows",
    "mean_eigenvalue",
    "natural_inverse",
    "normalised_inverse",
    "spd_inverse",
]
