"""Scaled GD and Scaled AdamW: Riemannian preconditioned LoRA (arXiv 2402.02347, equations 1-2 and algorithm 1).

What differs from the published methods, and why:

* damping is a fraction of the Gram matrix's mean eigenvalue (``damping_mode="relative"``), so that it needs no tuning
  per model: published values range from 1e-7 to 1e8;
* for AdamW the Gram matrix is also divided by its mean eigenvalue. Otherwise ``(BᵀB)⁻¹`` makes the first steps after
  ``B = 0`` enormous, and they stay in the second moment for 1/(1 − beta2) steps;
* both preconditioners come from the factors at which the gradient was taken (``order="jacobi"``).

``damping_mode="absolute"`` is the step of the programs that came with the paper, which differ: see ``ScaledAdamW``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dreamlora.optimizers._kernels import EXP_AVG, MOMENTUM, AdamWHyper, SGDHyper, adamw_, published_adamw_, sgd_
from dreamlora.optimizers._pairs import Group
from dreamlora.optimizers._scaled_base import ScaledBase
from dreamlora.optimizers._scaled_options import (
    BiasCorrection,
    DampingMode,
    Geometry,
    Order,
    Variant,
    check_adamw,
    check_gd,
)


class ScaledAdamW(ScaledBase):
    """AdamW whose moments are those of the scaled gradients.

    ``P = (K/τ + δI)⁻¹`` with ``τ = tr(K)/r`` keeps the gradient's magnitude, so learning rate and eps mean what they
    mean in AdamW; large ``δ`` is AdamW with ``eps·(1 + δ)``, and rank 1 is so for every ``δ``. Bias correction and
    weight decay (before the update) are ``torch.optim.AdamW``'s. State: as AdamW.

    Args:
        params: groups of ``lora_param_groups``.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``; may be set per group.
        damping: ``δ``, a fraction of the mean eigenvalue, or the published ``λ`` in absolute mode.
        damping_mode: "relative"; or "absolute", the step of the paper's programs: ``P = (K + λI)⁻¹``, weight decay
            after the update. Which of them it is, say the next three.
        bias_correction: of the moments, in absolute mode. "torch", ``m̂/(√v̂ + eps)``, in the program for DreamBooth;
            "folded", ``√(1−β₂ᵗ)/(1−β₁ᵗ) · m/(√v + eps)``, in that for GPT-2; "none" in those for Mistral and
            Mix-of-Show. Where eps rules, as with the published ``λ`` of a million, the first steps of these differ
            by up to ``1/√(1−β₂)``, 32 times.
        unscaled_below: in absolute mode, ``P`` is the identity while ``‖K‖_F`` is at most this; DreamBooth: 1e-6.
        order: "jacobi", both factors from the same point, as in the paper's equations and its program for DreamBooth;
            or "gauss_seidel", B scaled by the A just updated, as in its others and in AltLoRA.
        variant: "gradient"; or "split", ``P^½ → AdamW's step → P^½`` with ``P = (K + δτI)⁻¹``. The step then does not
            depend on how large A is and how small B: a scalar moved from one factor to the other changes nothing. lr
            is in other units: to begin with, 0.6 times AdamW's where A starts as in PEFT (uniform, Kaiming).
        geometry: of the scaling. "product": the other factor's Gram matrix. "tangent": in addition, what both factors
            would do twice is taken away (LoRA-Pro). "balanced": ``P_A = S⁻¹``, ``P_B = S`` with the geometric mean
            ``S = (AAᵀ)⁻¹ # BᵀB`` (RefLoRA); with "split" this is AdamW on the balanced factors.
        transport_momentum: carry the first moment along when the other factor changes (AltLoRA). Costs a second look
            at the factors per step. The second moment is left as it is.
        scale_correction: divide the step by ``s = alpha/r``, so that lr does not depend on alpha.

    Raises:
        ValueError: see ``LoraPairOptimizer``; or two options exclude each other.
    """

    _NORMALISES = True
    _MOMENTUM_KEY = EXP_AVG

    def __init__(  # noqa: PLR0913 - torch.optim's convention: one keyword per hyper-parameter
        self,
        params: list[Group],
        lr: float | Tensor = 2e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        damping: float = 0.1,
        damping_mode: DampingMode = "relative",
        bias_correction: BiasCorrection = "torch",
        unscaled_below: float = 0.0,
        order: Order = "jacobi",
        variant: Variant = "gradient",
        geometry: Geometry = "product",
        transport_momentum: bool = False,
        scale_correction: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
            "damping_mode": damping_mode,
            "bias_correction": bias_correction,
            "unscaled_below": unscaled_below,
            "order": order,
            "variant": variant,
            "geometry": geometry,
            "transport_momentum": transport_momentum,
            "scale_correction": scale_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        check_adamw(group)

    def added_settings(self, saved: Group) -> Group:
        folded = saved.get("damping_mode") == "absolute"
        return {**super().added_settings(saved), "bias_correction": "folded" if folded else "torch"}

    def descend(self, group: Group, params: list[Tensor], directions: list[Tensor], states: list[Any]) -> None:
        hyper = AdamWHyper(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["maximize"])
        if group["damping_mode"] == "absolute":
            published_adamw_(params, directions, states, hyper, group["bias_correction"])
        else:
            adamw_(params, directions, states, hyper)


class ScaledGD(ScaledBase):
    """Gradient descent on scaled gradients, with heavy-ball momentum behind the scaling.

    ``P = (K + δτI)⁻¹``. Without damping the path of ``BA`` does not depend on how it is split into factors; with
    relative damping it does not depend on scaling or rotating them. State: a momentum buffer if momentum is used.

    Args:
        params: groups of ``lora_param_groups``. Groups without pairs train by AdamW with their own lr: give them one
            (``lora_param_groups(..., fallback_lr=1e-4)``), as the rates of the two methods are orders apart.
        lr: in units of the natural step, not AdamW's.
        momentum: of the scaled gradient.
        damping, damping_mode, unscaled_below, order, transport_momentum: see ``ScaledAdamW``.
        variant: "gradient"; or "split", momentum between two half scalings (without momentum there is no difference).
        geometry: see ``ScaledAdamW``. "tangent" is LoRA-Pro's SGD mode. "balanced" moves B by about ‖B‖: from
            ``B = 0`` it leaves slowly.
        scale_correction: divide the step by ``s² = (alpha/r)²``, so that lr does not depend on alpha.
        weight_decay: decoupled, ``p ← (1 − lr·weight_decay) p`` before the update.
        betas, eps: of the AdamW for groups without pairs.

    Raises:
        ValueError: see ``ScaledAdamW``.
    """

    _NORMALISES = False
    _MOMENTUM_KEY = MOMENTUM

    def __init__(  # noqa: PLR0913 - torch.optim's convention: one keyword per hyper-parameter
        self,
        params: list[Group],
        lr: float | Tensor = 1e-1,
        *,
        momentum: float = 0.0,
        damping: float = 1e-2,
        damping_mode: DampingMode = "relative",
        unscaled_below: float = 0.0,
        order: Order = "jacobi",
        variant: Variant = "gradient",
        geometry: Geometry = "product",
        transport_momentum: bool = False,
        scale_correction: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "momentum": momentum,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
            "damping_mode": damping_mode,
            "unscaled_below": unscaled_below,
            "order": order,
            "variant": variant,
            "geometry": geometry,
            "transport_momentum": transport_momentum,
            "scale_correction": scale_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        check_gd(group)

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {MOMENTUM: tuple(p.shape)}

    def descend(self, group: Group, params: list[Tensor], directions: list[Tensor], states: list[Any]) -> None:
        hyper = SGDHyper(group["lr"], group["momentum"], group["weight_decay"], group["maximize"])
        sgd_(params, directions, states, hyper)
