"""Scaled GD and Scaled AdamW: Riemannian preconditioned LoRA (arXiv 2402.02347, equations 1-2 and algorithm 1).

What differs from the published methods, and why:

* damping is a fraction of the Gram matrix's mean eigenvalue (``damping_mode="relative"``), so that it needs no tuning
  per model: published values range from 1e-7 to 1e8;
* for AdamW the Gram matrix is also divided by its mean eigenvalue. Otherwise ``(BᵀB)⁻¹`` makes the first steps after
  ``B = 0`` enormous, and they stay in the second moment for 1/(1 − beta2) steps;
* both preconditioners come from the factors at which the gradient was taken (Jacobi order).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers import _checks
from dreamlora.optimizers._kernels import SGDHyper, sgd_
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer, Moves, PairBatch

DampingMode = Literal["relative", "absolute"]
# A Gram matrix has twice the factor's condition number in digits; with less damping float32 Cholesky can fail.
_SAFE_DAMPING = 1e-4
# Preconditioned gradients are applied in portions of so many elements: enough for one kernel, few enough for the cache.
_PORTION = {"cpu": 2**18}
_PORTION_DEFAULT = 2**26


def scaled_gradients(gA: Tensor, gB: Tensor, P_B: Tensor, P_A: Tensor) -> tuple[Tensor, Tensor]:
    """``g̃A = (BᵀB + λI)⁻¹ gA`` and ``g̃B = gB (AAᵀ + λI)⁻¹``: each gradient is scaled by the other factor.

    Without damping the step ``−η g̃`` moves the weight by ``−η s² (P_col(B) G + G P_row(A))`` to first order, however
    ``BA`` is split into factors.

    Args:
        gA, gB: gradients ``(b, r, n)`` and ``(b, m, r)``.
        P_B, P_A: damped inverses ``(b, r, r)`` of ``BᵀB`` and of ``AAᵀ``.
    """
    return P_B @ gA, gB @ P_A


class _Scaled(LoraPairOptimizer):
    """What Scaled GD and Scaled AdamW share."""

    _RELATIVE: linalg.DampedInverse

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.at_least_zero("damping", group["damping"])
        _checks.one_of("damping_mode", group["damping_mode"], ("relative", "absolute"))

    @property
    def stats(self) -> dict[str, int]:
        """``fallbacks``: inversions so far that failed and left a gradient unscaled. Reading it waits for a GPU."""
        return {"fallbacks": sum(int(count) for count in self._fallbacks.values())}

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        lr, ratio = group["lr"], group["lr_ratio_B"]
        for A_moves, B_moves in self._moves(group, batches):
            if ratio == 1.0:
                self.descend(group, A_moves + B_moves, lr)
            else:
                self.descend(group, A_moves, lr)
                self.descend(group, B_moves, lr * ratio)

    def descend(self, group: Group, moves: Moves, lr: float | Tensor) -> None:
        """Update parameters in place along their preconditioned gradients."""
        raise NotImplementedError

    def _moves(self, group: Group, batches: list[PairBatch]) -> Iterator[tuple[Moves, Moves]]:
        """Preconditioned gradients of the A and of the B factors, a portion at a time.

        All inverses come first: they are small, cheapest in one batch, and must see the factors before any update.
        """
        A_moves: Moves = []
        B_moves: Moves = []
        elements = 0
        inverses = self._inverses(group, batches)
        for batch, P_B, P_A in zip(batches, inverses[0::2], inverses[1::2], strict=True):
            gA, gB = batch.stacked_gradients()
            A_part, B_part = batch.moves(*scaled_gradients(gA, gB, P_B.to(gA.dtype), P_A.to(gB.dtype)))
            A_moves += A_part
            B_moves += B_part
            elements += gA.numel() + gB.numel()
            if elements >= _PORTION.get(gA.device.type, _PORTION_DEFAULT):
                yield A_moves, B_moves
                A_moves, B_moves, elements = [], [], 0
        if elements:
            yield A_moves, B_moves

    def _inverses(self, group: Group, batches: list[PairBatch]) -> list[Tensor]:
        """Damped inverses ``(b, r, r)`` of ``BᵀB`` and of ``AAᵀ``, alternating, of every batch."""
        damping = group["damping"]
        grams: list[Tensor] = []
        for batch in batches:
            precise = damping < _SAFE_DAMPING and batch.A[0].device.type != "mps"
            A, B = batch.stacked_factors(torch.float64 if precise else None)
            grams += [linalg.gram_columns(B), linalg.gram_rows(A)]
        inverse = type(self)._RELATIVE if group["damping_mode"] == "relative" else linalg.absolute_inverse
        inverses, failures = linalg.common_rank_inverse(grams, inverse, damping)
        for count in failures:
            self._fallbacks[count.device] = self._fallbacks.get(count.device, 0) + count
        return inverses

    def _reset(self) -> None:
        super()._reset()
        self._fallbacks: dict[torch.device, Tensor | int] = {}


class ScaledAdamW(_Scaled):
    """AdamW whose moments are those of the preconditioned gradients.

    ``P = (K/τ + δI)⁻¹`` with ``τ = tr(K)/r`` keeps the gradient's magnitude, so learning rate and eps mean what they
    mean in AdamW; large ``δ`` is AdamW with ``eps·(1 + δ)``, and rank 1 is so for every ``δ``. Bias correction and
    weight decay (before the update) are ``torch.optim.AdamW``'s; the published code does not correct eps, and decays
    after. State: as AdamW.

    Args:
        params: groups of ``lora_param_groups``.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; may be set per group.
        damping: ``δ`` relative to the mean eigenvalue, or the published ``λ`` in absolute mode.
        damping_mode: "relative" or "absolute" (``P = (K + λI)⁻¹``).

    Raises:
        ValueError: see ``LoraPairOptimizer``.
    """

    _RELATIVE = staticmethod(linalg.normalised_inverse)

    def __init__(  # noqa: PLR0913 - the keywords of torch.optim.AdamW and two more
        self,
        params: list[Group],
        lr: float | Tensor = 2e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        damping: float = 0.1,
        damping_mode: DampingMode = "relative",
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**defaults, "damping": damping, "damping_mode": damping_mode})

    def descend(self, group: Group, moves: Moves, lr: float | Tensor) -> None:
        self.adamw_update({**group, "lr": lr}, moves)


class ScaledGD(_Scaled):
    """Gradient descent on preconditioned gradients, with heavy-ball momentum behind the preconditioner.

    ``P = (K + δτI)⁻¹``. Without damping the path of ``BA`` does not depend on how it is split into factors; with
    relative damping it does not depend on scaling or rotating them. State: a momentum buffer if momentum is used.

    Args:
        params: groups of ``lora_param_groups``. Groups without pairs train by AdamW with their own lr: give them one
            (``lora_param_groups(..., fallback_lr=1e-4)``), as the rates of the two methods are orders apart.
        lr: in units of the natural step, not AdamW's.
        momentum: of the preconditioned gradient.
        damping, damping_mode: see ``ScaledAdamW``.
        weight_decay: decoupled, ``p ← (1 − lr·weight_decay) p`` before the update.
        betas, eps: of the AdamW for groups without pairs.

    Raises:
        ValueError: see ``LoraPairOptimizer``.
    """

    _RELATIVE = staticmethod(linalg.natural_inverse)

    def __init__(  # noqa: PLR0913 - torch.optim's convention: one keyword per hyper-parameter
        self,
        params: list[Group],
        lr: float | Tensor = 1e-1,
        *,
        momentum: float = 0.0,
        damping: float = 1e-2,
        damping_mode: DampingMode = "relative",
        weight_decay: float = 0.0,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own = {"momentum": momentum, "damping": damping, "damping_mode": damping_mode}
        super().__init__(params, {**defaults, **own})

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.fraction("momentum", group["momentum"])

    def descend(self, group: Group, moves: Moves, lr: float | Tensor) -> None:
        hyper = SGDHyper(lr, group["momentum"], group["weight_decay"], group["maximize"])
        sgd_([p for p, _ in moves], [d for _, d in moves], [self.state[p] for p, _ in moves], hyper)
