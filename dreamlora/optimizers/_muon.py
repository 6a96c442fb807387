"""LoRA-Muon: spectral steps in coordinates that do not depend on the factorisation (arXiv 2606.12921).

    mX ← β mX + (1 − β) gX
    δB = −(η/2) msign(mB K_A^-½) K_A^-½          δA = −(η/2) K_B^-½ msign(K_B^-½ mA)
    X ← c X + δX/c,  c = √(1 − η·wd)

``msign(Z) = Z (ZᵀZ)^-½`` has all singular values 1. In place of ``K^-½`` stands the inverse Cholesky factor: the two
differ by a rotation, which ``msign`` passes through. ``c`` makes the product ``BA`` decay by exactly ``1 − η·wd``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import MOMENTUM
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer
from dreamlora.optimizers._rank_space import RankSpace, count, rank_spaces


class LoRAMuon(LoraPairOptimizer):
    """LoRA-Muon (arXiv 2606.12921), for starts at ``B = 0`` too.

    To first order a step changes the weight ``BA`` by at most ``lr`` (times ``r^-rank_power``) in spectral norm,
    whatever the width and the factors' scale. The path of ``BA`` is the same for every factorisation of the start.
    State: one momentum.

    Where B has hardly any length, the paper's step of A is many times A itself (its runs start with both factors at
    random). Here ``trust`` bounds it, and a direction of B that is mere rounding has no step. With ``trust=0`` and
    ``rank_power=0`` the step is that of its algorithm 1, up to the whitening: there ``1e-5·‖K‖_F`` is added to ``K``.

    Args:
        params: groups of ``lora_param_groups``. Groups without pairs train by AdamW with their own lr: give them one
            (``lora_param_groups(..., fallback_lr=1e-4)``).
        lr: bound of the spectral norm of the change of ``BA`` per step, at rank 1.
        rank_power: ``p`` of ``r^-p``, by which steps get shorter as the rank grows. With 0 (the paper's) all singular
            values of a factor's step are ``lr/2``, so that its Frobenius norm grows with ``√r`` and the best rate
            falls with the rank; with ½ the Frobenius norm would be the same. See ``benchmarks/robustness.py``.
        momentum: share of the running mean of gradients that is kept.
        weight_decay: of the product.
        damping: added to the partners' Gram matrices, a fraction of their mean eigenvalue: shortens steps that a nearly
            singular partner would magnify, at the price of exact invariance.
        trust: by how much of its length a step may change a direction of A; 0 is without bound. Exactly invariant.
        scale_correction: divide steps by ``s``, so that lr bounds the change of the effective weight ``s·BA``.
        betas, eps: of the AdamW for groups without pairs.
        maximize: ascend.

    Raises:
        ValueError: see ``LoraPairOptimizer``; or lr·weight_decay is 1 or more.
    """

    def __init__(  # noqa: PLR0913 - torch.optim's convention: one keyword per hyper-parameter
        self,
        params: list[Group],
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.7,
        weight_decay: float = 0.0,
        damping: float = 0.0,
        rank_power: float = 0.25,
        scale_correction: bool = True,
        trust: float = 0.1,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own = {"momentum": momentum, "damping": damping, "scale_correction": scale_correction}
        super().__init__(params, {**defaults, **own, "rank_power": rank_power, "trust": trust})

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.fraction("momentum", group["momentum"])
        for name in ("damping", "rank_power", "trust"):
            _checks.at_least_zero(name, group[name])
        decay = float(group["lr"]) * max(1.0, group["lr_ratio_B"]) * group["weight_decay"]
        if group["lora_pairs"] and decay >= 1:
            raise ValueError(f"weight_decay: got lr × weight_decay = {decay:g}, must be below 1")

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {MOMENTUM: tuple(p.shape)}

    @property
    def stats(self) -> dict[str, int]:
        """``fallbacks``: factor updates left out because a matrix could not be factored. Reading it waits for a GPU."""
        return {"fallbacks": sum(int(n) for n in self._fallbacks.values())}

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        for space in rank_spaces([(group, batches)]):
            count(self._fallbacks, space.failed)
            whitened, moment = space.whitened(self._momenta(space))
            root, failed = linalg.inverse_root(moment, 0.0, space.dtype)
            count(self._fallbacks, failed)
            # moment is Z Zᵀ / n, and a row of msign has length 1
            size = root.shape[-1] ** -group["rank_power"]
            back = space.back([size / 2] * len(space.sides))
            self._descend(space, whitened, back @ root * (size * space.lengths().rsqrt()))

    def _momenta(self, space: RankSpace) -> list[Tensor]:
        """The running means of the gradients, by side."""
        beta, momenta = space.group["momentum"], []
        for side in space.sides:
            m = side.gradients()
            if beta:
                m = torch.lerp(side.momenta(self, MOMENTUM), m, 1 - beta)
                side.keep_momenta(self, MOMENTUM, m)
            momenta.append(m)
        return momenta

    def _descend(self, space: RankSpace, whitened: list[Tensor], matrices: Tensor) -> None:
        sign = -1.0 if space.group["maximize"] else 1.0
        for side, T, z in zip(space.sides, space.split(matrices.to(space.dtype)), whitened, strict=True):
            lr, decay = space.rates(side)
            c = math.sqrt(1 - lr * decay)
            old = side.stack(side.params)
            side.write(old, side.combine(old, T, z, keep=c, factor=-sign * lr / (2 * c)))

    def _reset(self) -> None:
        super()._reset()
        self._fallbacks: dict[torch.device, Any] = {}
