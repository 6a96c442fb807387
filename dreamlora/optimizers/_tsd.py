"""LoRA-TSD: spectral steps inside the tangent space of the matrices of rank r (arXiv 2609.02734).

    mX ← β mX + (1 − β) gX
    X₀ = P_T(G),   X_{t+1} = P_T(msign(X_t)) for t < τ,   P_T(Z) = P_B Z + Z P_A − P_B Z P_A
    δB = −η X_τ A⁺         δA = −η B⁺ X_τ (I − P_A)         so that δB A + B δA = −η X_τ
    X ← c X + δX/c,  c = √(1 − η·wd)

``P_T(G)`` needs no more of ``G`` than ``mA = BᵀG`` and ``mB = G Aᵀ``. In orthonormal coordinates (``_tangent``) every
``X_t`` is a ``2r × 2r`` matrix, and ``P_T`` sets a quarter of it to zero. So however many projections there are, the
long matrices are read twice: for the Gram matrix of ``[X, mX]``, and for the step, which is a combination of these two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch, moves_of, stack
from dreamlora.optimizers._kernels import MOMENTUM, compute_dtype
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer
from dreamlora.optimizers._rank_space import count
from dreamlora.optimizers._tangent import TangentFrame, bounded, flattened, frames, step_of, tangent


class _Stack:
    """A factor of ``b`` pairs beside its gradients: ``[A; mA]`` ``(b, 2r, n)`` or ``[B, mB]`` ``(b, m, 2r)``.

    Attributes:
        params: the factors.
        wide: whether these are the A.
    """

    def __init__(self, params: list[Tensor], wide: bool, gradients: list[Tensor]) -> None:
        self.params, self.wide = params, wide
        self._both = torch.cat([stack(params), stack(gradients)], 1 if wide else 2)

    def gram(self) -> Tensor:
        """``(b, 2r, 2r)`` in ``linalg.gram_dtype``."""
        x = self._both.to(linalg.gram_dtype(self._both.device))
        return x @ x.mT if self.wide else x.mT @ x

    def move(self, step: Tensor, keep: float, factor: float) -> None:
        """``X ← keep·X + factor·step·[X; mX]`` for what has a gradient; ``step`` ``(b, r, 2r)``."""
        x, r, step = self._both, step.shape[1], step.to(self._both.dtype)
        if self.wide:
            new = torch.baddbmm(x[:, :r], step, x, beta=keep, alpha=factor)
        else:
            new = torch.baddbmm(x[:, :, :r], x, step.mT, beta=keep, alpha=factor)
        moves = moves_of(self.params, new)
        if moves:
            torch._foreach_copy_([p for p, _ in moves], [after for _, after in moves])


class LoRATSD(LoraPairOptimizer):
    """LoRA-TSD (arXiv 2609.02734), for starts at ``B = 0`` too.

    To first order a step moves the weight ``BA`` by a matrix of the tangent space whose singular values are all about
    ``lr`` (times ``r^-rank_power``), and at most ``√2·lr``. LoRA-Muon makes ``δB A`` and ``B δA`` flat one by one, this
    their sum. The path of ``BA`` is the same for every factorisation of the start. State: one momentum.

    Where B has hardly any length, the published step of A is many times A itself (without end at ``B = 0``; the paper
    starts elsewhere). Here ``trust`` bounds it as in ``LoRAMuon``, and a direction of B that is mere rounding has no
    step.

    Args:
        params: groups of ``lora_param_groups``. Groups without pairs train by AdamW with their own lr: give them one
            (``lora_param_groups(..., fallback_lr=1e-4)``).
        lr: spectral norm of the change of ``BA`` per step, at rank 1.
        momentum: share of the running mean of gradients that is kept. The paper names none.
        projections: ``τ``, how often the direction is made flat and projected. With 1 it is that of Riemannion (arXiv
            2507.12142); the paper takes 3 to 5.
        weight_decay: of the product.
        rank_power: ``p`` of ``r^-p``, by which steps get shorter as the rank grows, as in ``LoRAMuon``; published: 0.
        scale_correction: divide steps by ``s``, so that lr is the change of the effective weight ``s·BA``.
        trust: by how much of its length a step may change a direction of A; 0, published, is without bound.
        betas, eps: of the AdamW for groups without pairs.
        maximize: ascend.

    Raises:
        ValueError: see ``LoraPairOptimizer``; or lr·weight_decay is 1 or more.
    """

    def __init__(  # noqa: PLR0913 - torch.optim's convention: one keyword per hyper-parameter
        self,
        params: list[Group],
        lr: float | Tensor = 5e-3,
        *,
        momentum: float = 0.9,
        projections: int = 3,
        weight_decay: float = 0.0,
        rank_power: float = 0.25,
        scale_correction: bool = True,
        trust: float = 0.1,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own = {"momentum": momentum, "projections": projections, "scale_correction": scale_correction}
        super().__init__(params, {**defaults, **own, "rank_power": rank_power, "trust": trust})

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.fraction("momentum", group["momentum"])
        _checks.whole_number("projections", group["projections"], 1)
        for name in ("rank_power", "trust"):
            _checks.at_least_zero(name, group[name])
        decay = float(group["lr"]) * max(1.0, group["lr_ratio_B"]) * group["weight_decay"]
        if group["lora_pairs"] and decay >= 1:
            raise ValueError(f"weight_decay: got lr × weight_decay = {decay:g}, must be below 1")

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {MOMENTUM: tuple(p.shape)}

    @property
    def stats(self) -> dict[str, int]:
        """``fallbacks``: steps left out because a matrix could not be factored. Reading it waits for a GPU."""
        return {"fallbacks": sum(int(n) for n in self._fallbacks.values())}

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        alike: dict[Any, list[PairBatch]] = {}
        for batch in batches:
            p = batch.A[0]
            alike.setdefault((p.shape[0], p.device, p.dtype), []).append(batch)
        for members in alike.values():
            self._update(group, members)

    def _update(self, group: Group, batches: list[PairBatch]) -> None:
        """Pairs of one rank, device and dtype."""
        sides = [
            [_Stack(b.A, True, self._gradients(group, b.A)) for b in batches],
            [_Stack(b.B, False, self._gradients(group, b.B)) for b in batches],
        ]
        of_A, of_B = (torch.cat([one.gram() for one in side]) for side in sides)
        for side, steps in zip(sides, self._steps(group, batches, of_A, of_B), strict=True):
            for one, step in zip(side, steps.split([len(one.params) for one in side]), strict=True):
                lr = float(group["lr"]) * (1.0 if one.wide else group["lr_ratio_B"])
                c = math.sqrt(1 - lr * group["weight_decay"])
                one.move(step, keep=c, factor=(lr if group["maximize"] else -lr) / c)

    def _gradients(self, group: Group, params: list[Tensor]) -> list[Tensor]:
        """The running means, with this step's gradients in them; a missing one counts as zero."""
        dtype, beta = compute_dtype(params[0].dtype), group["momentum"]
        gradients = [torch.zeros_like(p, dtype=dtype) if p.grad is None else p.grad.to(dtype) for p in params]
        if not beta:
            return gradients
        for p in params:
            if MOMENTUM not in self.state[p]:
                self.state[p][MOMENTUM] = torch.zeros_like(p, dtype=dtype)
        momenta = [self.state[p][MOMENTUM] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - beta)
        return momenta

    def _steps(self, group: Group, batches: list[PairBatch], of_A: Tensor, of_B: Tensor) -> tuple[Tensor, Tensor]:
        """``(k, r, 2r)`` for all A and all B: what their ``[X, mX]`` are to be multiplied with."""
        p = batches[0].A[0]
        frame_A, frame_B = frames(of_A, of_B, p.dtype)
        count(self._fallbacks, frame_A.failed | frame_B.failed)
        # What both factors could follow is B's, as published, unless B is not trained.
        theirs = _column([float(q.grad is not None) for b in batches for q in b.B], of_A)
        T = tangent(torch.lerp(frame_A.core, frame_B.core.mT, theirs), frame_A.edge, frame_B.edge.mT)
        T = flattened(T.to(compute_dtype(p.dtype)), group["projections"]).to(of_A.dtype)
        r = p.shape[0]
        C, N, P = T[:, :r, :r], T[:, :r, r:], T[:, r:, :r]
        per_scaling = [1 / abs(s) if group["scale_correction"] else 1.0 for b in batches for s in b.scalings]
        length = _column(per_scaling, of_A) * r ** -group["rank_power"]
        shorten = _trusted(group, frame_A, of_A, of_B, length) if group["trust"] else None
        return (
            step_of(frame_A, (1 - theirs) * C, N, shorten) * length,
            step_of(frame_B, theirs * C.mT, P.mT) * length,
        )

    def _reset(self) -> None:
        super()._reset()
        self._fallbacks: dict[torch.device, Any] = {}


def _trusted(group: Group, A: TangentFrame, of_A: Tensor, of_B: Tensor, length: Tensor) -> Tensor:
    """``D`` ``(k, r, r)``, which shortens steps of A where ``BA`` is shorter than a step; see ``RankSpace``.

    The identity where A is zero: there ``BA`` is as well, and A has no length that could be changed too much.
    """
    K_A, K_B = (H[:, : H.shape[-1] // 2, : H.shape[-1] // 2] for H in (of_A, of_B))
    D = bounded(A.partner @ K_B @ K_A @ A.own.mT, float(group["lr"]) / (2 * group["trust"]) * length)
    identity = torch.eye(D.shape[-1], dtype=D.dtype, device=D.device)
    return torch.where(linalg.mean_eigenvalue(K_A) <= linalg.TAU_MIN, identity, D)


def _column(numbers: list[float], like: Tensor) -> Tensor:
    """``(k, 1, 1)``, without waiting for the device."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)[:, None, None]
