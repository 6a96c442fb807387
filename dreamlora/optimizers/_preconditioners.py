"""The ``r × r`` matrices of Scaled GD and Scaled AdamW, batched; pure functions of Gram matrices.

Notation: ``KB = BᵀB`` scales the gradient of A from the left, ``KA = AAᵀ`` that of B from the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers._roots import damped_condition, geometric_mean, spd_roots


@dataclass(frozen=True)
class PreconditionerRecipe:
    """How the matrices are made.

    Attributes:
        damping: ``δ`` (relative) or ``λ`` (absolute).
        absolute: damping is ``λ``.
        unscaled_below: absolute: where the Frobenius norm of ``K`` is at most this, the scaling is the identity.
        split: half of the scaling before the moments, half behind them.
        balanced: RefLoRA's geometric mean instead of the other factor's Gram matrix.
        normalise: divide Gram matrices by their mean eigenvalue (for methods that normalise their step anyway).
    """

    damping: float
    absolute: bool
    unscaled_below: float
    split: bool
    balanced: bool
    normalise: bool

    @classmethod
    def of(cls, group: Mapping[str, Any], normalises: bool) -> PreconditionerRecipe:
        """The recipe of a parameter group, for a method that ``normalises`` its step or not."""
        absolute, split = group["damping_mode"] == "absolute", group["variant"] == "split"
        balanced = group["geometry"] == "balanced"
        normalise = normalises and not (absolute or split)
        return cls(group["damping"], absolute, group["unscaled_below"], split, balanced, normalise)


@dataclass(frozen=True)
class Scaling:
    """What scales one factor's gradient in ``b`` pairs; made of the other factor's Gram matrix ``K``.

    Attributes:
        before: ``(b, r, r)``, symmetric; multiplies the gradient before the moments.
        after: ``(b, r, r)``, symmetric; multiplies the normalised direction; None is the identity.
        unit: ``(b, 1, 1)``: ``before = unit · (K + λI)⁻¹`` if there is no ``after``.
        shift: ``λ`` for the transport of momentum ``(b, 1, 1)``.
    """

    before: Tensor
    after: Tensor | None
    unit: Tensor
    shift: Tensor

    def natural(self) -> Tensor:
        """``(K + λI)⁻¹``."""
        return self.before / self.unit if self.after is None else self.before @ self.after

    def halves(self) -> tuple[Scaling, Scaling]:
        """The first and the second half of the batch."""
        before, unit, shift = (x.chunk(2) for x in (self.before, self.unit, self.shift))
        after: Sequence[Tensor | None] = (None, None) if self.after is None else self.after.chunk(2)
        return Scaling(before[0], after[0], unit[0], shift[0]), Scaling(before[1], after[1], unit[1], shift[1])

    def split(self, sizes: list[int]) -> list[Scaling]:
        """Parts of ``sizes`` pairs, in order."""
        parts = [x.split(sizes) for x in (self.before, self.unit, self.shift)]
        afters: Sequence[Tensor | None] = [None] * len(sizes) if self.after is None else self.after.split(sizes)
        return [Scaling(b, a, u, s) for b, u, s, a in zip(*parts, afters, strict=True)]


def scalings(KB: Tensor, KA: Tensor, recipe: PreconditionerRecipe) -> tuple[Scaling, Scaling, Tensor]:
    """The scalings of A's and of B's gradient, and how many could not be had (they are the identity) ``()``.

    product: ``(KB + λI)⁻¹`` and ``(KA + λI)⁻¹`` (arXiv 2402.02347); with ``normalise`` times ``τ = tr(K)/r``.
    balanced: ``S⁻¹`` and ``S`` with ``S = KA⁻¹ # KB`` (RefLoRA, arXiv 2505.18877), the Gram matrices damped.
    split: the square roots of these, before the moments and behind them.

    Args:
        KB, KA: Gram matrices ``(b, r, r)``.
    """
    if recipe.balanced:
        return _balanced(KB, KA, recipe)
    K = torch.cat([KB, KA])
    one = K.new_ones(len(K), 1, 1)
    if recipe.absolute:
        P, failed = linalg.absolute_inverse(K, recipe.damping)
        if recipe.unscaled_below:
            small = K.norm(dim=(-2, -1)) <= recipe.unscaled_below
            identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
            P, failed = torch.where(small[:, None, None], identity, P), failed & ~small
        both = Scaling(P, None, one, torch.zeros_like(one))
    else:
        M, tau = linalg.relative(K, recipe.damping)
        shift = recipe.damping * tau
        if recipe.split:
            _, root, failed = spd_roots(M, damped_condition(K.shape[-1], recipe.damping))
            root = root * tau.rsqrt()
            both = Scaling(root, root, one, shift)
        else:
            P, failed = linalg.spd_inverse(M)
            both = Scaling(P, None, tau, shift) if recipe.normalise else Scaling(P / tau, None, one, shift)
    return *both.halves(), failed.sum()


def _balanced(KB: Tensor, KA: Tensor, recipe: PreconditionerRecipe) -> tuple[Scaling, Scaling, Tensor]:
    (MB, tau_B), (MA, tau_A) = (linalg.relative(K, recipe.damping) for K in (KB, KA))
    condition = damped_condition(KB.shape[-1], recipe.damping)
    S, S_inverse, failed = geometric_mean(MA, MB, condition)
    size = torch.ones_like(tau_A) if recipe.normalise else (tau_B / tau_A).sqrt()
    one = torch.ones_like(size)
    if not recipe.split:
        return Scaling(S_inverse / size, None, one, one), Scaling(S * size, None, one, one), failed.sum()
    root, inverse_root, _ = spd_roots(S, condition)
    for_A, for_B = inverse_root / size.sqrt(), root * size.sqrt()
    return Scaling(for_A, for_A, one, one), Scaling(for_B, for_B, one, one), failed.sum()


def remove_double_count(
    A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, natural: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients whose scaled steps sum to the projection on the tangent space of rank-r matrices.

    The product geometry moves the weight by ``P_B G + G P_A``, in which ``P_B G P_A`` is counted twice. Here each
    factor gives up half of it: ``gA − ½ C (AAᵀ)⁻¹A`` and ``gB − ½ B(BᵀB)⁻¹ C`` with ``C = BᵀgB = gA Aᵀ``. That is
    LoRA-Pro's solution (arXiv 2407.18242, theorem 2.1) at ``X = −½ (BᵀB)⁻¹ C (AAᵀ)⁻¹``: the choice of its free matrix
    that depends on the product alone and treats both factors alike. All choices move the weight the same way.

    Args:
        A, B: ``(b, r, n)`` and ``(b, m, r)``.
        gA, gB: their gradients. A missing one is zero and takes nothing from the other.
        natural: ``(BᵀB + λI)⁻¹`` and ``(AAᵀ + λI)⁻¹`` ``(b, r, r)``.
    """
    natural_B, natural_A = natural
    without_A = torch.baddbmm(gA, (B.mT @ gB) @ natural_A, A, alpha=-0.5)
    return without_A, torch.baddbmm(gB, B, natural_B @ (gA @ A.mT), alpha=-0.5)


def transport(old: Scaling, new: Scaling, cross: Tensor) -> Tensor:
    """``T`` ``(b, r, r)`` that carries A's momentum from the coordinates of ``B_old`` to those of ``B_new``: ``T m``.

    The momentum stands for the weight change ``B_old m``; ``T m`` is the ``x`` that minimises ``‖B_new x − B_old m‖²``:
    ``T = (BᵀB + λI)⁻¹ Bᵀ B_old`` (AltLoRA, arXiv 2505.12455). Relative damping minimises that plus ``λ‖x − m‖²``, so
    that momentum stays as it is while B does, instead of fading in the damped directions at every step. For B's
    momentum, in the coordinates of A: ``m Tᵀ``.

    Args:
        old, new: scalings of A's gradient at ``B_old`` and at ``B_new``.
        cross: ``B_newᵀ B_old``, or ``A_new A_oldᵀ``.
    """
    identity = torch.eye(cross.shape[-1], dtype=cross.dtype, device=cross.device)
    M = new.before @ (cross + new.shift * identity)
    return M / old.unit if old.after is None else M @ old.after
