"""Square roots and geometric means of small positive definite matrices, batched, where possible without eigenvalues.

A polynomial iteration instead of ``eigh``: on a GPU ``eigh`` waits for the host and works one matrix at a time; this is
a fixed number of batched multiplications, which compiles and can be captured in a CUDA graph (and on a CPU takes a
third of the time). The number follows from a bound on the condition number, and damping gives that bound before any
data are seen.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dreamlora import linalg


class Roots(NamedTuple):
    """``M^½`` and ``M^-½`` ``(..., r, r)``, symmetric, and where they could not be had (the identity there)."""

    root: Tensor
    inverse_root: Tensor
    failed: Tensor


# Largest condition number at which the iteration is used in float32 and in float64: the error of the inverse root is
# about the unit roundoff times the condition number.
_ITERATION_LIMIT = {torch.float32: 1e4, torch.float64: 1e12}
FLOOR = 1e-3
"""``inverse_root`` in float32 takes directions for none that are this short beside the length of all together."""
_FLOOR_PRECISION = 3e-3  # of the length of a direction above it: that of a step, of which it is below a percent
_FLOOR_DOUBLE = 1e-6


def damped_condition(r: int, damping: float) -> float:
    """Bound on ``‖M‖_F / λ_min(M)`` for ``M = K/τ + δI`` of rank ``r``: ``r(1 + δ)/δ``, as ``tr(K/τ) = r``."""
    return r * (1 + damping) / damping if damping else math.inf


def spd_roots(M: Tensor, condition: float) -> Roots:
    """Symmetric ``M^½`` and ``M^-½`` of symmetric positive definite ``M`` ``(..., r, r)``.

    Up to a condition number of 1e12 by a coupled iteration, which is nothing but multiplications: no synchronisation
    with a GPU, no LAPACK call per matrix; the number of rounds follows from ``condition`` and not from the data.
    Beyond, and for ``condition=inf``, by eigenvalues in float64, floored at 1e-15 of the largest.

    Args:
        condition: an upper bound on ``‖M‖_F / λ_min(M)``; too small a value gives a wrong result.
    """
    dtype, device = M.dtype, M.device
    if condition > _ITERATION_LIMIT[torch.float32]:
        M = linalg.wide(M)
    identity = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    norm = torch.linalg.matrix_norm(M, keepdim=True)
    bad = ~(torch.isfinite(norm) & (norm > 0))
    M, norm = torch.where(bad, identity, M), torch.where(bad, math.sqrt(M.shape[-1]), norm)
    if condition <= _ITERATION_LIMIT[torch.float64]:
        floor = condition**-0.5
        root, inverse_root = _coupled(M / norm, quintic_steps(floor, torch.finfo(M.dtype).eps))
        root, inverse_root = root * norm.sqrt(), inverse_root / norm.sqrt()
    else:
        values, vectors = torch.linalg.eigh(M)
        values = values.clamp_min(1e-15 * values[..., -1:])[..., None, :].sqrt()
        root, inverse_root = (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT
    # the cast comes first: there may be no float64 on the device
    root, inverse_root = (linalg.symmetric(x).to(dtype).to(device) for x in (root, inverse_root))
    return Roots(root, inverse_root, bad[..., 0, 0].to(device))


def inverse_root(V: Tensor, eps: float, dtype: torch.dtype) -> linalg.Inverse:
    """``(V^½ + εI)⁻¹`` of positive semi-definite ``V`` ``(..., r, r)`` without eigenvalues.

    Where V has fewer directions than rows, the others are rounding, and are not to be enlarged to the size of the rest:
    in place of ``V^-½`` stands ``V² (V + fI)^-5/2``, with ``f`` 1e-12 of V's trace for data of float64 and ``FLOOR²``
    of it for others, for which it is made in multiplications of float32 alone.

    Args:
        V: any precision.
        eps: ``ε >= 0``.
        dtype: precision of the data that ``V`` was made of.
    """
    trace = V.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    bad = ~torch.isfinite(trace)
    zero = bad | (trace <= linalg.TAU_MIN)
    identity = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    scale = torch.where(zero, 1.0, trace)
    W = torch.where(zero, identity, V / scale)
    floor, make = (_FLOOR_DOUBLE, _precise_root) if dtype == torch.float64 else (FLOOR, _quick_root)
    X, failed = make(W + floor**2 * identity)
    some = identity.to(X.dtype) - floor**2 * (X @ X)  # V/(V + f)
    root = linalg.symmetric(X @ some @ some) * scale.rsqrt().to(X.dtype)
    if eps:
        root = linalg.symmetric(root @ linalg.spd_inverse(identity.to(root.dtype) + eps * root).P)
    # A zero V has the root 1/eps; what it multiplies is zero, so it may as well be zero (eps may be too).
    failed = failed | bad[..., 0, 0]
    return linalg.Inverse(torch.where(zero | failed[..., None, None], 0.0, root), failed)


def _precise_root(W: Tensor) -> tuple[Tensor, Tensor]:
    """``W^-½`` of eigenvalues in [``_FLOOR_DOUBLE²``, 1], and where there is none.

    With Cholesky ``W = L Lᵀ`` and polar decomposition ``Lᵀ = U H``: ``H = W^½`` and ``W^-½ = L⁻ᵀU``, which loses half
    as many digits as an iteration on ``W`` does.
    """
    L, L_inverse, failed = linalg.cholesky(W)
    return linalg.symmetric(L_inverse.mT @ polar_factor(L.mT, _FLOOR_DOUBLE)), failed


def _quick_root(W: Tensor) -> tuple[Tensor, Tensor]:
    """``W^-½`` of eigenvalues in [``FLOOR²``, 1] by the fewest multiplications in float32; it fails nowhere."""
    _, X = _coupled(W.float(), quintic_steps(FLOOR, _FLOOR_PRECISION), inverse_alone=True)
    return X, torch.zeros(W.shape[:-2], dtype=torch.bool, device=W.device)


def _coupled(
    P: Tensor, steps: tuple[tuple[float, float, float], ...], inverse_alone: bool = False
) -> tuple[Tensor, Tensor]:
    """``P^½`` and ``P^-½`` by ``Y ← Y q(ZY)``, ``Z ← q(ZY) Z`` from ``Y = P``, ``Z = I``; symmetric but for rounding.

    Every step turns the singular values ``σ`` of the polar factor that it approaches into ``σ q(σ²)``.

    Args:
        P: symmetric, with eigenvalues in [floor², 1] ``(..., r, r)``.
        steps: of ``quintic_steps``.
        inverse_alone: leave out the last multiplication of ``Y``.
    """
    shape = P.shape
    Y = P.reshape(-1, *shape[-2:])
    Z: Tensor | None = None
    for i, (a, b, c) in enumerate(steps):
        M = Y if Z is None else Z @ Y
        Q = torch.baddbmm(M, M, M, beta=b, alpha=c)
        Q.diagonal(dim1=-2, dim2=-1).add_(a)
        Z = Q if Z is None else Q @ Z
        if not (inverse_alone and i == len(steps) - 1):
            Y = Y @ Q
    if Z is None:  # no steps
        Z = torch.eye(shape[-1], dtype=P.dtype, device=P.device).expand_as(Y)
    return Y.view(shape), Z.reshape(shape)


def polar_factor(X: Tensor, floor: float, precision: float | None = None) -> Tensor:
    """The orthogonal factor ``U`` of ``X = U H``.

    Args:
        X: square ``(k, r, r)``, of spectral norm at most 1.
        floor: singular values from here to 1 become 1 up to ``precision``; smaller ones keep an order below.
        precision: without, that of the data.
    """
    for a, b, c in quintic_steps(floor, precision or torch.finfo(X.dtype).eps):
        M = X.mT @ X
        Q = torch.baddbmm(M, M, M, beta=b, alpha=c)
        Q.diagonal(dim1=-2, dim2=-1).add_(a)
        X = X @ Q
    return X


@cache
def quintic_steps(floor: float, precision: float) -> tuple[tuple[float, float, float], ...]:
    """``(a, b, c)`` of polynomials ``σ(a + bσ² + cσ⁴)`` that one by one bring [floor, 1] to [1 − precision, 1].

    Each is the one that brings the interval that the last one left closest to 1: composed, no others do better (Polar
    Express, arXiv 2505.16932). What is below ``floor`` grows by the first coefficients, and is nowhere turned negative.
    """
    steps: list[tuple[float, float, float]] = []
    low = floor
    while 1 - low > precision:
        a, b, c, error = _closest_to_one(low)
        # The first ones rise steeply behind 1, and would enlarge what rounding puts there.
        margin = 1.001 if low < 0.5 else 1.0
        a, b, c = a / margin / (1 + error), b / margin**3 / (1 + error), c / margin**5 / (1 + error)
        steps.append((a, b, c))
        low *= a + b * low**2 + c * low**4
    return tuple(steps)


def _closest_to_one(low: float) -> tuple[float, float, float, float]:
    """``a, b, c`` of the odd quintic closest to 1 on [low, 1], and its largest error there (Remez' exchange)."""
    if low > 1 - 1e-3:  # the points would fall together: Taylor's, whose error is below 4e-9
        return 1.875, -1.25, 0.375, 1 - low * (1.875 - 1.25 * low**2 + 0.375 * low**4)
    inner = (3 * low + 1) / 4, (low + 3) / 4
    a = b = c = error = 0.0
    for _ in range(60):
        x = (low, *inner, 1.0)
        t = [each * each for each in x]
        weights = [1 / (x[i] * math.prod(t[i] - t[j] for j in range(4) if j != i)) for i in range(4)]
        last, error = error, sum(weights) / sum(w * (-1) ** i for i, w in enumerate(weights))
        values = [(1 - (-1) ** i * error) / x[i] for i in range(3)]
        first = [(values[i + 1] - values[i]) / (t[i + 1] - t[i]) for i in range(2)]
        c = (first[1] - first[0]) / (t[2] - t[0])
        b = first[0] - c * (t[0] + t[1])
        a = values[0] - b * t[0] - c * t[0] ** 2
        if abs(error - last) <= 1e-15:
            break
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c, abs(error)


def geometric_mean(KA: Tensor, KB: Tensor, condition: float) -> tuple[Tensor, Tensor, Tensor]:
    """``S = KA⁻¹ # KB``, the positive definite ``S`` with ``S KA S = KB``; ``S⁻¹``; and where both failed ``(...)``.

    With ``KA = LLᵀ``: ``S = L⁻ᵀ (Lᵀ KB L)^½ L⁻¹``. Refactoring ``(B S^-½, S^½ A)`` gives both factors the same Gram
    matrix, up to a rotation (RefLoRA, arXiv 2505.18877).

    Args:
        KA, KB: symmetric positive definite ``(..., r, r)``.
        condition: an upper bound on ``‖K‖_F / λ_min(K)`` of either.
    """
    dtype, device = KA.dtype, KA.device
    if condition**2 > _ITERATION_LIMIT[torch.float32]:
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
