"""The tangent space of the matrices of rank r at ``BA``, in orthonormal coordinates: pure, batched, without waiting.

``U = B E_Bᵀ`` and ``Vᵀ = E_A A`` span the columns of B and the rows of A, ``Q_B`` and ``Q_A`` what a gradient has
outside of these. A tangent direction is ``[U, Q_B] T [V, Q_A]ᵀ`` with

    T = [[C, N], [P, 0]]        (2r × 2r)

and to project a matrix in these bases on the tangent space is to set the last block to zero. B is taken as its
transpose, so that both factors are alike: ``X`` is A or Bᵀ, ``M`` its gradient, ``r`` rows each.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers._roots import polar_factor

_LEVEL = 1e-8
"""Relative damping, at least: the square root of float64's precision. Products with two inverse roots of something that
was damped by it are as exact."""
_FLOOR = 1e-3
"""Least singular value of a direction that becomes 1, as a share of its Frobenius norm."""


class TangentFrame(NamedTuple):
    """One factor ``X`` of ``k`` pairs and its gradient ``M``; all are ``(k, r, r)``.

    Attributes:
        own: ``E``: the rows of ``E X`` are orthonormal.
        partner: ``E`` of the other factor: ``partner·M`` is the gradient of the product along U or V.
        core: its part within the rows of ``E X``.
        outer: the rows of ``outer·(partner·M − core·E X)`` are orthonormal.
        edge: ``partner·M − core·E X`` in those rows.
        failed: ``(k,)`` bool: a matrix could not be factored; what comes from it is zero.
    """

    own: Tensor
    partner: Tensor
    core: Tensor
    outer: Tensor
    edge: Tensor
    failed: Tensor


def frames(of_A: Tensor, of_B: Tensor, dtype: torch.dtype) -> tuple[TangentFrame, TangentFrame]:
    """Both factors' frames.

    Args:
        of_A: Gram matrices ``(k, 2r, 2r)`` of ``[A; mA]``, in ``linalg.gram_dtype``.
        of_B: of ``[B, mB]``.
        dtype: precision of the factors.
    """
    r, level = of_A.shape[-1] // 2, max(linalg.rounding_level(dtype, of_A.dtype), _LEVEL)
    (E_A, failed_A), (E_B, failed_B) = (
        _coordinates(K, linalg.mean_eigenvalue(K), level) for K in (of_A[:, :r, :r], of_B[:, :r, :r])
    )
    failed = failed_A | failed_B
    return _frame(E_A, E_B, of_A, level, failed), _frame(E_B, E_A, of_B, level, failed)


def _frame(own: Tensor, partner: Tensor, H: Tensor, level: float, failed: Tensor) -> TangentFrame:
    r = own.shape[-1]
    core = partner @ H[:, r:, :r] @ own.mT
    whole = linalg.symmetric(partner @ H[:, r:, r:] @ partner.mT)
    rest = whole - core @ core.mT
    # Rounding is a share of the whole, not of the rest, which may be nothing else.
    outer, unfactored = _coordinates(rest, linalg.mean_eigenvalue(whole), level)
    return TangentFrame(own, partner, core, outer, rest @ outer.mT, failed | unfactored)


def _coordinates(K: Tensor, tau: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """``E`` with ``E K Eᵀ = I`` but for directions shorter than ``level·τ``, where it is zero; and where there is none.

    The inverse Cholesky factor of ``K + level·τ``, short by a share ``X`` of its length, corrected up to ``X³``: what
    is outside of a span is found by subtraction, and what the basis lacks in length would pass for it.
    """
    zero = tau <= linalg.TAU_MIN
    tau = torch.where(zero, 1.0, tau)
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    _, E, failed = linalg.cholesky(torch.where(zero, identity, K / tau) + level * identity)
    X = level * E @ E.mT
    E = torch.linalg.matrix_power(identity - X, 4) @ (identity + X @ (4.5 * identity + 12.375 * X)) @ E * tau.rsqrt()
    return torch.where(zero | failed[:, None, None], 0.0, E), failed


def tangent(C: Tensor, N: Tensor, P: Tensor) -> Tensor:
    """``[[C, N], [P, 0]]`` ``(k, 2r, 2r)``."""
    return torch.cat([torch.cat([C, N], -1), torch.cat([P, torch.zeros_like(C)], -1)], -2)


def flattened(T: Tensor, projections: int) -> Tensor:
    """``X_τ`` of ``X_{t+1} = P_T(msign(X_t))``, ``X₀ = T``: all singular values about 1, and ``√2`` at most.

    Those of ``X_t`` below ``_FLOOR`` fade out with their third power: a plain matrix sign in every round would make
    rounding as large as the rest.

    Args:
        T: ``(k, 2r, 2r)``, tangent.
        projections: ``τ >= 1``.
    """
    r = T.shape[-1] // 2
    norm = torch.linalg.matrix_norm(T, keepdim=True)
    X = T / torch.where(norm == 0, 1.0, norm)
    for t in range(projections):
        X = polar_factor(X / math.sqrt(2) if t else X, _FLOOR)
        X = X @ (X.mT @ X)
        X[:, r:, r:] = 0.0
    return X


def step_of(frame: TangentFrame, core: Tensor, edge: Tensor, shorten: Tensor | None = None) -> Tensor:
    """``(k, r, 2r)``: the matrix whose product with ``[X; M]`` moves the factor along a tangent direction.

    Args:
        frame: of the factor.
        core, edge: blocks of the direction that the factor is to follow, with rows in the partner's basis.
        shorten: applied to the rows of the direction.
    """
    along = edge @ frame.outer
    step = torch.cat([(core - along @ frame.core) @ frame.own, along @ frame.partner], -1)
    return frame.partner.mT @ (step if shorten is None else shorten @ step)


def bounded(S: Tensor, c: Tensor) -> Tensor:
    """``D = W (W + c²I)⁻¹`` with ``W = S Sᵀ``: ``‖S⁻¹D‖ <= 1/(2c)``, and the identity where S is longer than c.

    Args:
        S: ``(k, r, r)``.
        c: ``(k, 1, 1)``, >= 0.
    """
    W, c2 = linalg.symmetric(S @ S.mT), c.square()
    scale = linalg.mean_eigenvalue(W) + c2
    scale = torch.where(scale <= linalg.TAU_MIN, 1.0, scale)
    W = W / scale
    return W @ linalg.spd_inverse(W + c2 / scale * torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)).P
