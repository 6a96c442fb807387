"""Small dense linear algebra for LoRA factors: pure, batched over leading dimensions, without host synchronisation.

Notation: ``A`` is ``(..., r, n)``, ``B`` is ``(..., m, r)``, ``K`` is a Gram matrix ``(..., r, r)``.
"""

from __future__ import annotations

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
    _, L_inverse, failed = cholesky(M)
    return Inverse(L_inverse.mT @ L_inverse, failed)


def natural_inverse(K: Tensor, damping: float) -> Inverse:
    """``(K + δτI)⁻¹`` with ``τ = tr(K)/r``; the identity where ``τ`` is zero.

    The natural (Gauss-Newton) scale: ``K -> cK`` divides it by ``c``. For methods that take the gradient as is (SGD).

    Args:
        K: Gram matrices ``(..., r, r)``.
        damping: ``δ >= 0``, a fraction of the mean eigenvalue.
    """
    M, tau = relative(K, damping)
    P, failed = spd_inverse(M)
    return Inverse(P / tau, failed)


def absolute_inverse(K: Tensor, damping: float) -> Inverse:
    """``(K + λI)⁻¹``: the published form, whose ``λ`` has the unit of ``K`` and so depends on initialisation and width.

    Args:
        K: Gram matrices ``(..., r, r)``.
        damping: ``λ >= 0``.
    """
    return spd_inverse(K + damping * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device))


def relative(K: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """``K/τ + δI`` with ``τ = tr(K)/r`` ``(..., 1, 1)``; where ``τ`` is zero, the identity and 1.

    The eigenvalues lie in ``[δ, r + δ]``, so the inverse changes a gradient's direction and keeps its magnitude.
    ``K -> cK`` changes nothing. For methods that normalise their step (Adam).

    Args:
        K: Gram matrices ``(..., r, r)``.
        damping: ``δ >= 0``, a fraction of the mean eigenvalue.
    """
    tau = mean_eigenvalue(K)
    zero = tau <= TAU_MIN
    tau = torch.where(zero, 1.0, tau)
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    return torch.where(zero, identity, K / tau + damping * identity), tau


def decomposable(x: Tensor) -> Tensor:
    """``x`` where torch can factor it, and find eigenvalues: its own device, or the CPU for Apple's GPUs (MPS).

    For those torch has no QR, and Cholesky and ``eigh`` in its latest versions alone. Waits for them, for no other.
    """
    return x.cpu() if x.device.type == "mps" else x


def wide(x: Tensor) -> Tensor:
    """``x`` in float64: on its own device, or on the CPU if the device has no float64 (MPS).

    In two steps, as MPS would cast before it copies.
    """
    return decomposable(x).double()


_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-8}
_ROUNDING_LOW = 1e-4
_ROUNDING_SINGLE_GRAM = 1e-5


def gram_dtype(device: torch.device) -> torch.dtype:
    """Precision of Gram matrices made on the device: float64, as they square the condition number (MPS has none)."""
    return torch.float32 if device.type == "mps" else torch.float64


def rounding_level(dtype: torch.dtype, gram: torch.dtype) -> float:
    """Relative damping below which a Gram matrix of factors of ``dtype``, computed in ``gram``, says nothing."""
    level = _ROUNDING.get(dtype, _ROUNDING_LOW)
    return level if gram == torch.float64 else max(level, _ROUNDING_SINGLE_GRAM)


class Orthonormal(NamedTuple):
    """A batch of orthonormal coordinates ``(..., r, r)``.

    Attributes:
        E: lower triangular; zero where ``failed``.
        share: ``E K Eᵀ``: the identity, but for directions that the damping shortens.
        failed: ``(...)`` bool; ``K`` was not positive definite in this precision, or not finite.
    """

    E: Tensor
    share: Tensor
    failed: Tensor


def orthonormal_coordinates(K: Tensor, damping: float) -> Orthonormal:
    """``E`` with ``E K Eᵀ = I``: for ``K = BᵀB`` the columns of ``B Eᵀ`` are an orthonormal basis of B's columns.

    ``E`` is the inverse Cholesky factor of ``K + δτI``; a direction with eigenvalue ``λ`` is so only ``λ/(λ + δτ)``
    long, which for ``δ`` at the rounding level is a pseudo-inverse. A zero ``K`` gives zero.

    Args:
        K: Gram matrices ``(..., r, r)``.
        damping: ``δ > 0``, a fraction of the mean eigenvalue.
    """
    M, tau = relative(K, damping)
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    _, E, failed = cholesky(M)
    dead = (mean_eigenvalue(K) <= TAU_MIN) | failed[..., None, None]
    E = torch.where(dead, 0.0, E)
    # not E K Eᵀ: where E is largest, that is the rounding of K
    share = identity - damping * (E @ E.mT)
    return Orthonormal(torch.where(dead, 0.0, E * tau.rsqrt()), share, failed)


def symmetric(M: Tensor) -> Tensor:
    """``½(M + Mᵀ)``."""
    return 0.5 * (M + M.mT)


def cholesky(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``L`` and ``L⁻¹`` of ``M = L Lᵀ`` ``(..., r, r)``, the identity where there is none; and where that is."""
    device = M.device
    M = decomposable(M)
    L, info = torch.linalg.cholesky_ex(M)
    failed = info != 0
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    L = torch.where(failed[..., None, None], identity, L)
    L_inverse = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    return L.to(device), L_inverse.to(device), failed.to(device)


def eigenvalues(M: Tensor) -> Tensor:
    """Of symmetric ``M`` ``(..., r, r)``: ``(..., r)``, rising."""
    return torch.linalg.eigvalsh(decomposable(M)).to(M.device)


__all__ = [
    "TAU_MIN",
    "Inverse",
    "Orthonormal",
    "absolute_inverse",
    "cholesky",
    "decomposable",
    "eigenvalues",
    "gram_columns",
    "gram_dtype",
    "gram_rows",
    "mean_eigenvalue",
    "natural_inverse",
    "orthonormal_coordinates",
    "relative",
    "rounding_level",
    "spd_inverse",
    "symmetric",
    "wide",
]
