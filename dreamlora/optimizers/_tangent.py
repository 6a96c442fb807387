"""The tangent space of the matrices of rank r at ``BA``, in orthonormal coordinates: pure, batched, without waiting.

``U = B E_Bᵀ`` and ``Vᵀ = E_A A`` span the columns of B and the rows of A, ``Q_B`` and ``Q_A`` what a gradient has
outside of these. A tangent direction is ``[U, Q_B] T [V, Q_A]ᵀ`` with

    T = [[C, N], [P, 0]]        (2r × 2r)

and to project a matrix in these bases on the tangent space is to set the last block to zero. B is taken as its
transpose, so that both factors are alike: ``X`` is A or Bᵀ, ``M`` its gradient, ``Y`` that in the partner's basis; all
have ``r`` rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers._roots import polar_factor

_LEVEL = 1e-8
"""Relative damping, at least: the square root of float64's precision. Products with two inverse roots of something that
was damped by it are as exact."""
_SHORTEST = 1.25
"""A matrix with an eigenvalue below ``-level/5`` counts as not factored."""
_FLOOR = 1.25e-3
"""Least singular value of a direction that becomes 1, as a share of its Frobenius norm."""
_BEFORE_LAST = 1e-3
"""How far from 1 singular values in float32 may be before the last step; after it they are at most a tenth of that."""


class Bases(NamedTuple):
    """``k`` factors ``X``; all are ``(k, r, r)``.

    Attributes:
        own: ``E``: the rows of ``E X`` are orthonormal.
        partner: ``E`` of the other factor: ``partner·M`` is the gradient of the product along U or V.
        failed: ``(k,)`` bool: a matrix could not be factored; what comes from it is zero.
    """

    own: Tensor
    partner: Tensor
    failed: Tensor


def bases(grams: Tensor, of_partners: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Bases:
    """Those of all factors.

    Args:
        grams: ``X Xᵀ`` ``(k, r, r)``, in ``linalg.gram_dtype``.
        of_partners: brings what is stacked by factor in the order of their partners.
        dtype: precision of the factors.
    """
    own, failed = _coordinates(grams, linalg.mean_eigenvalue(grams), _level(dtype, grams.dtype))
    return Bases(own, of_partners(own), failed | of_partners(failed))


class TangentFrame(NamedTuple):
    """Gradients ``Y = partner·M`` beside their factors; all are ``(k, r, r)``.

    Attributes:
        bases: of the factors.
        core: the part of ``Y`` within the rows of ``E X``.
        outer: the rows of ``outer·(Y − core·E X)`` are orthonormal.
        edge: ``Y − core·E X`` in those rows.
        failed: ``(k,)`` bool: as of ``bases``, or what is outside could not be factored.
    """

    bases: Bases
    core: Tensor
    outer: Tensor
    edge: Tensor
    failed: Tensor


def frames(of: Bases, cross: Tensor, whole: Tensor, dtype: torch.dtype) -> TangentFrame:
    """The frames of all factors.

    ``partner`` can be so large that the Gram matrix of ``M``, multiplied by it from both sides, would be rounding: that
    of ``Y`` itself is taken.

    Args:
        of: their bases.
        cross, whole: ``Y Xᵀ`` and ``Y Yᵀ`` ``(k, r, r)``, in ``linalg.gram_dtype``.
        dtype: precision of the factors.
    """
    core = cross @ of.own.mT
    rest = linalg.symmetric(whole - core @ core.mT)
    # Rounding is a share of the whole, not of the rest, which may be nothing else.
    outer, unfactored = _coordinates(rest, linalg.mean_eigenvalue(whole), _level(dtype, whole.dtype))
    return TangentFrame(of, core, outer, rest @ outer.mT, of.failed | unfactored)


def _level(dtype: torch.dtype, gram: torch.dtype) -> float:
    return max(linalg.rounding_level(dtype, gram), _LEVEL)


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
    # A direction of no length has 1. One whose square is negative, by rounding, would come out longer than any.
    failed = failed | (X.diagonal(dim1=-2, dim2=-1).amax(-1) > _SHORTEST)
    X2 = X @ X
    fade = torch.add(X2, X, alpha=-2.0).add_(identity)  # (I − X)²
    E = fade @ (fade @ (X2.mul_(12.375).add_(X, alpha=4.5).add_(identity) @ (E * tau.rsqrt())))
    return torch.where(zero | failed[:, None, None], 0.0, E), failed


def tangent(C: Tensor, N: Tensor, P: Tensor) -> Tensor:
    """``[[C, N], [P, 0]]`` ``(k, 2r, 2r)``."""
    return torch.cat([torch.cat([C, N], -1), torch.cat([P, torch.zeros_like(C)], -1)], -2)


def flattened(T: Tensor, projections: int) -> Tensor:
    """``X_τ`` of ``X_{t+1} = P_T(msign(X_t))``, ``X₀ = T``: all singular values about 1, and ``√2`` at most.

    Those of ``X_t`` below ``_FLOOR`` fade out with their third power: a plain matrix sign in every round would make
    rounding as large as the rest. Above, ``msign`` is exact in float64, and 1e-4 from it in float32.

    Args:
        T: ``(k, 2r, 2r)``, tangent.
        projections: ``τ >= 1``.
    """
    norm = torch.linalg.matrix_norm(T, keepdim=True)
    X = _flat(T / torch.where(norm == 0, 1.0, norm))
    for _ in range(projections - 1):
        X = _flat(X / math.sqrt(2))
    return X


def _flat(X: Tensor) -> Tensor:
    """``P_T(msign(X))``, with ``σ³(5 − 3σ²)/2`` for the last step of the sign: that squares its error, too."""
    r = X.shape[-1] // 2
    X = polar_factor(X, _FLOOR, None if X.dtype == torch.float64 else _BEFORE_LAST)
    M = X.mT @ X
    X = X @ torch.baddbmm(M, M, M, beta=2.5, alpha=-1.5)
    X[:, r:, r:] = 0.0
    return X


def steps_of(frame: TangentFrame, core: Tensor, edge: Tensor) -> Tensor:
    """``(k, r, 2r)``: whose product with ``[X; Y]`` is a tangent direction, with rows in the partner's basis.

    Args:
        frame: of the factors and ``Y``.
        core, edge: blocks of the direction, ``(k, r, r)``.
    """
    along = edge @ frame.outer
    return torch.cat([(core - along @ frame.core) @ frame.bases.own, along], -1)
