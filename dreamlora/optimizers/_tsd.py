"""LoRA-TSD: spectral steps inside the tangent space of the matrices of rank r (arXiv 2609.02734).

    mX ← β mX + (1 − β) gX
    X₀ = P_T(G),   X_{t+1} = P_T(msign(X_t)) for t < τ,   P_T(Z) = P_B Z + Z P_A − P_B Z P_A
    δB = −η X_τ A⁺         δA = −η B⁺ X_τ (I − P_A)         so that δB A + B δA = −η X_τ
    X ← c X + δX/c,  c = √(1 − η·wd)

``P_T(G)`` needs no more of ``G`` than ``mA = BᵀG`` and ``mB = G Aᵀ``. In orthonormal coordinates (``_tangent``) every
``X_t`` is a ``2r × 2r`` matrix, and ``P_T`` sets a quarter of it to zero. So however many projections there are, the
long matrices are multiplied four times: for the Gram matrices of ``X`` and of ``Y``, for ``Y``, which is ``mX`` in the
partner's basis, and for the step, which is a combination of ``X`` and ``Y``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import MOMENTUM
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer
from dreamlora.optimizers._rank_space import RankSpace, Side, check_product_decay, rank_spaces
from dreamlora.optimizers._tangent import TangentFrame, bases, flattened, frames, steps_of, tangent

_PIECE = 2**16
"""Elements of factors that are copied together on the CPU."""


class LoRATSD(LoraPairOptimizer):
    """LoRA-TSD (arXiv 2609.02734), for starts at ``B = 0`` too.

    To first order a step moves the weight ``BA`` by a matrix of the tangent space whose singular values are all about
    ``lr`` (times ``r^-rank_power`` and ``(pairs/64)^-layer_power``), and at most ``√2·lr``. LoRA-Muon makes ``δB A``
    and ``B δA`` flat one by one, this their sum. The path of ``BA`` is the same for every factorisation of the start.
    State: one momentum.

    Singular values below 1/800 of the gradient's length (Frobenius) fade out of the direction; those above are made
    equal exactly in float64, and up to 1e-4 in float32.

    Where B has hardly any length, the published step of A is many times A itself (without end at ``B = 0``; the paper
    starts elsewhere). Here ``trust`` bounds it as in ``LoRAMuon``, and a direction of B that is mere rounding has no
    step.

    Args:
        params: groups of ``lora_param_groups``. Groups without pairs train by AdamW with their own lr: give them one
            (``lora_param_groups(..., fallback_lr=1e-4)``).
        lr: spectral norm of the change of ``BA`` per step, at rank 1 and with 64 pairs.
        momentum: share of the running mean of gradients that is kept. The paper names none.
        projections: ``τ``, how often the direction is made flat and projected. With 1 it is that of Riemannion (arXiv
            2507.12142); the paper takes 3 to 5.
        weight_decay: of the product.
        rank_power, layer_power: by which steps get shorter the larger the rank is, and the more pairs there are, as in
            ``LoRAMuon``; published: 0.
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
        layer_power: float = 0.5,
        scale_correction: bool = True,
        trust: float = 0.1,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own = {"momentum": momentum, "projections": projections, "scale_correction": scale_correction}
        super().__init__(
            params, {**defaults, **own, "rank_power": rank_power, "layer_power": layer_power, "trust": trust}
        )

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.fraction("momentum", group["momentum"])
        _checks.whole_number("projections", group["projections"], 1)
        for name in ("rank_power", "layer_power", "trust"):
            _checks.at_least_zero(name, group[name])
        check_product_decay(group)

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {MOMENTUM: tuple(p.shape)}

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        for space in rank_spaces(group, batches, self.pair_count):
            self._update(space)

    def _update(self, space: RankSpace) -> None:
        pieces = list(_pieces(space, space.momenta(self)))
        own = torch.cat([_gram(side, space.gram_dtype) for side, _ in pieces])
        found = bases(own, space.of_partners, space.params[0].dtype)
        sizes = [len(m) for _, m in pieces]
        partners = found.partner.to(space.dtype).split(sizes)
        seen = [side.product(T, m) for T, (side, m) in zip(partners, pieces, strict=True)]
        grams = [
            _grams(side, y.to(space.gram_dtype), space.gram_dtype) for (side, _), y in zip(pieces, seen, strict=True)
        ]
        cross, whole = (torch.cat(blocks) for blocks in zip(*grams, strict=True))
        frame = frames(found, cross, whole, space.params[0].dtype)
        steps = self._steps(space, own, frame).to(space.dtype).split(sizes)
        for (side, _), y, step in zip(pieces, seen, steps, strict=True):
            space.move(side, step, torch.cat([side.stack(), y], 1 if side.wide else 2), space.size)

    def _steps(self, space: RankSpace, own: Tensor, frame: TangentFrame) -> Tensor:
        """``(k, r, 2r)``: what the ``[X, Y]`` of the factors are to be multiplied with.

        Args:
            own: Gram matrices of the factors ``(k, r, r)``.
        """
        group, r = space.group, space.rank
        self.count("fallbacks", frame.failed.chunk(2)[0])
        core_A, core_B = frame.core.chunk(2)
        edge_A, edge_B = frame.edge.chunk(2)
        # What both factors could follow is B's, as published, unless B is not trained.
        trained = [float(p.grad is not None) for side in space.sides if not side.wide for p in side.params]
        theirs = torch.tensor(trained, dtype=space.gram_dtype).to(space.device, non_blocking=True)[:, None, None]
        T = tangent(torch.lerp(core_A, core_B.mT, theirs), edge_A, edge_B.mT)
        T = flattened(T.to(space.dtype), group["projections"]).to(space.gram_dtype)
        C, N, P = T[:, :r, :r], T[:, :r, r:], T[:, r:, :r]
        steps = steps_of(frame, torch.cat([(1 - theirs) * C, theirs * C.mT]), torch.cat([N, P.mT]))
        back = frame.bases.partner.mT
        if group["trust"]:
            (K_A, K_B), (for_A, for_B) = own.chunk(2), back.chunk(2)
            norms = [space.size] * len(space.sides)
            back = torch.cat([for_A @ space.trusted(for_A.mT, K_B, K_A, norms), for_B])
        return back @ steps


def _pieces(space: RankSpace, momenta: list[Tensor]) -> Iterator[tuple[Side, Tensor]]:
    """The factors and momenta by side; on the CPU in pieces whose copies are small, as fresh memory is slow."""
    for side, m in zip(space.sides, momenta, strict=True):
        size = max(1, _PIECE // m[0].numel()) if m.device.type == "cpu" else len(m)
        for i in range(0, len(m), size):
            yield replace(side, params=side.params[i : i + size]), m[i : i + size]


def _gram(side: Side, dtype: torch.dtype) -> Tensor:
    """``X Xᵀ``."""
    X = side.stack(dtype)
    return side.gram(X, X)


def _grams(side: Side, Y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``Y Xᵀ`` and ``Y Yᵀ``."""
    return side.gram(Y, side.stack(dtype)), side.gram(Y, Y)
