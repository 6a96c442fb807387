"""LoRA-Muon: spectral steps in coordinates that do not depend on the factorisation (arXiv 2606.12921).

    mX ← β mX + (1 − β) gX
    δB = −(η/2) msign(mB K_A^-½) K_A^-½          δA = −(η/2) K_B^-½ msign(K_B^-½ mA)
    X ← c X + δX/c,  c = √(1 − η·wd)

``msign(Z) = Z (ZᵀZ)^-½`` has all singular values 1. In place of ``K^-½`` stands the inverse Cholesky factor: the two
differ by a rotation, which ``msign`` passes through. That of a K of some steps ago does as well, as it changes with the
factorisation in the same way; so it is made in float64, but only every few steps. ``msign`` is made in float32, by few
multiplications: any function of ``ZZᵀ`` in its place is the same in every factorisation. ``c`` makes the product ``BA``
decay by exactly ``1 − η·wd``.
"""

from __future__ import annotations

from torch import Tensor

from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import MOMENTUM
from dreamlora.optimizers._pairs import Group
from dreamlora.optimizers._rank_space import BACK, WHITENING, RankSpace, check_product_decay, rank_spaces
from dreamlora.optimizers._refresh import RefreshingOptimizer
from dreamlora.optimizers._roots import inverse_root


class LoRAMuon(RefreshingOptimizer):
    """LoRA-Muon (arXiv 2606.12921), for starts at ``B = 0`` too.

    To first order a step changes the weight ``BA`` by at most ``lr`` (times ``r^-rank_power`` and
    ``(pairs/64)^-layer_power``) in spectral norm, whatever the width and the factors' scale. The path of ``BA`` is the
    same for every factorisation of the start. State: one momentum and, per factor, two ``r × r`` matrices. Nothing else
    may change the factors between two steps (an average of weights must put them back), unless ``refresh`` is 1.

    Where B has hardly any length, the paper's step of A is many times A itself (its runs start with both factors at
    random). Here ``trust`` bounds it, and a direction of B that is mere rounding has no step. With ``trust=0``,
    ``rank_power=0`` and ``layer_power=0`` the step is that of its algorithm 1, up to the whitening: there
    ``1e-5·‖K‖_F`` is added to ``K``.

    Args:
        params: groups of ``lora_param_groups``. Groups without pairs train by AdamW with their own lr: give them one
            (``lora_param_groups(..., fallback_lr=1e-4)``).
        lr: bound of the spectral norm of the change of ``BA`` per step, at rank 1 and with 64 pairs.
        rank_power: ``p`` of ``r^-p``, by which steps get shorter as the rank grows. With 0 (the paper's) all singular
            values of a factor's step are ``lr/2``, so that its Frobenius norm grows with ``√r`` and the best rate
            falls with the rank; with ½ the Frobenius norm would be the same. See ``benchmarks/robustness.py``.
        layer_power: ``q`` of ``(pairs/64)^-q``, by which steps get shorter the more pairs the optimizer has: they all
            change the model's output in the same step. If they do so independently of each other, the sum grows with
            the root of their number, and ½ keeps it; 0 is the paper's. See ``benchmarks/robustness.py``.
        momentum: share of the running mean of gradients that is kept.
        weight_decay: of the product.
        damping: added to the partners' Gram matrices, a fraction of their mean eigenvalue: shortens steps that a nearly
            singular partner would magnify, at the price of exact invariance.
        trust: by how much of its length a step may change a direction of A; 0 is without bound. Exactly invariant.
        refresh: the matrices of the partners serve for so many steps, after the first 20, which make them anew each;
            1 always does. The path stays independent of the factorisation, and to first order the bound may be passed
            by what the partner has changed meanwhile.
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
        layer_power: float = 0.5,
        scale_correction: bool = True,
        trust: float = 0.1,
        refresh: int = 4,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own = {"momentum": momentum, "damping": damping, "scale_correction": scale_correction}
        own |= {"rank_power": rank_power, "layer_power": layer_power, "trust": trust, "refresh": refresh}
        super().__init__(params, {**defaults, **own})

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.fraction("momentum", group["momentum"])
        for name in ("damping", "rank_power", "layer_power", "trust"):
            _checks.at_least_zero(name, group[name])
        check_product_decay(group)

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {MOMENTUM: tuple(p.shape), WHITENING: (rank, rank), BACK: (rank, rank)}

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        due, _ = self.begin_step(group, batches)
        for space in rank_spaces(group, batches, self.pair_count):
            if due:
                self._refresh(space)
            whitened, moment = space.whitened(space.momenta(self), space.matrix(self, WHITENING))
            root, failed = inverse_root(moment, 0.0, space.dtype)
            self.count("fallbacks", failed)
            matrices = space.split(space.matrix(self, BACK) @ root.to(space.dtype))
            for side, T, z in zip(space.sides, matrices, whitened, strict=True):
                space.move(side, T, z, space.size / 2)

    def _refresh(self, space: RankSpace) -> None:
        """Make the matrices of the partners anew."""
        at = space.coordinates()
        self.count("fallbacks", at.failed)
        space.keep(self, WHITENING, at.whitening)
        space.keep(self, BACK, space.back(at, [space.size / 2] * len(space.sides)))
