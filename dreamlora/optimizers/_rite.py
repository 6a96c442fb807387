"""LoRA-RITE: matrix-preconditioned Adam in coordinates that do not depend on the factorisation (arXiv 2410.20625).

For ``A`` (for ``B`` with the roles swapped), with ``Q = B Eᵀ`` an orthonormal basis of B's columns:

    Ū = E gA = s QᵀG                        gradient in honest units ("unmagnified"), r × n
    P = Q_tᵀ Q_{t−1}                        change of basis since the last step
    V = β₂ P V Pᵀ + (1 − β₂) Ū Ūᵀ / n       second moment, r × r
    M = β₁ P M + (1 − β₁) (V^½ + ε)⁻¹ Ū     momentum of the preconditioned direction
    A ← A − η (Eᵀ M + wd·A)

with ``β = β(1 − β^{t−1})/(1 − β^t)`` in place of a bias correction. What differs from the published code:

* no basis is stored, so the state is half of AdamW's: what ``P`` needs is formed while the factors before and after
  the step are both at hand;
* the basis comes from a Cholesky factor instead of QR and pseudo-inverse, the root from Newton-Schulz instead of
  eigenvalues; all pairs of a rank at once;
* by default the step of A is bounded where B has hardly any length (``trust``), without which runs from B = 0 with
  more ranks than gradient directions learn little; ``trust=0`` is the published step;
* convolutions, bfloat16 parameters, AdamW for parameters outside of pairs, and counters of what was clipped.

Nothing else may change the factors between two steps (an average of weights must put them back).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import EXP_AVG, STEP
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer
from dreamlora.optimizers._rank_space import RankSpace, count, rank_spaces

SECOND_MOMENT, BASIS, ESCAPED = "second_moment", "basis", "escaped"


@dataclass
class _FactorStep:
    """One rank space in the middle of a step.

    Attributes:
        space: the factors.
        unmagnified: ``Ū`` by side.
        moment: ``Ū Ūᵀ / n`` ``(k, r, r)``.
        kept: ``(k,)``: what ``Ū`` is multiplied by: 0 where the update is skipped, below 1 where it is clipped.
    """

    space: RankSpace
    unmagnified: list[Tensor]
    moment: Tensor
    kept: Tensor


class LoRARITE(LoraPairOptimizer):
    """LoRA-RITE (arXiv 2410.20625).

    The path of ``BA`` is the same for every factorisation ``(BR, R⁻¹A)`` of the start, momentum, weight decay and
    clipping included. State per pair: one momentum of the factors' size and four ``r × r`` matrices: half of AdamW.

    A missing gradient of one factor of a pair counts as zero in the moments; the factor does not move.

    Args:
        params: groups of ``lora_param_groups``. Groups without pairs train by AdamW with their own lr.
        lr: the step of an entry of the whitened factor. AdamW's rate times ``σ_A √n`` (0.6 for Kaiming starts) moves
            the weight as far as AdamW does in the first step.
        betas: decay of momentum and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, ``p ← p − lr·weight_decay·p``.
        clip_unmagnified_grad: bound of the norm of all ``Ū`` together; 0 is none. ``stats`` counts its use. It acts
            behind, and in other units than, clipping of ``p.grad``.
        update_skipping: a factor whose ``Ū`` has a larger root mean square than this counts as without gradient; 0,
            the default, is never (the published 1 can silently stop layers; ``stats`` counts).
        update_capping: bound of the root mean square of ``M``; 0 is none.
        apply_escape: keep second moment that leaves the basis as a multiple of the identity.
        scale_correction: divide steps by ``s``, so that lr does not depend on alpha.
        trust: by how much of its length a step may change a direction of A; 0, as published, is without bound.
        rank_power: ``p`` of ``r^-p``, by which steps get shorter as the rank grows; 0, as published, is not at all.
        maximize: ascend.

    Raises:
        ValueError: see ``LoraPairOptimizer``.
    """

    def __init__(  # noqa: PLR0913 - the keywords of the published optimizer
        self,
        params: list[Group],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_unmagnified_grad: float = 1.0,
        update_skipping: float = 0.0,
        update_capping: float = 0.0,
        apply_escape: bool = False,
        scale_correction: bool = True,
        trust: float = 0.1,
        rank_power: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        bounds = {"clip_unmagnified_grad": clip_unmagnified_grad, "update_skipping": update_skipping}
        own = {"update_capping": update_capping, "apply_escape": apply_escape, "scale_correction": scale_correction}
        super().__init__(
            params, {**defaults, **bounds, **own, "trust": trust, "rank_power": rank_power, "damping": 0.0}
        )

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        for name in ("clip_unmagnified_grad", "update_skipping", "update_capping", "trust", "rank_power"):
            _checks.at_least_zero(name, group[name])

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        square = (rank, rank)
        return {STEP: (), EXP_AVG: tuple(p.shape), SECOND_MOMENT: square, BASIS: square, ESCAPED: ()}

    def state_dtype(self, key: str, p: Tensor) -> torch.dtype:
        small = key in (SECOND_MOMENT, BASIS, ESCAPED)
        return linalg.gram_dtype(p.device) if small else super().state_dtype(key, p)

    @property
    def stats(self) -> dict[str, int]:
        """Counters since the start; reading them waits for a GPU.

        ``clipped``: steps in which the unmagnified gradients were clipped; ``skipped``: factor updates skipped as too
        large; ``fallbacks``: factor updates left out because a matrix could not be factored (not finite).
        """
        return {name: sum(int(n) for n in total.values()) for name, total in self._counts.items()}

    def update_all_pairs(self, work: list[tuple[Group, list[PairBatch]]]) -> None:
        """Whiten all gradients, clip them together, then update."""
        works = [self._begin(space) for space in rank_spaces(work)]
        self._clip(works)
        for each in works:
            self._update(each)

    def _begin(self, space: RankSpace) -> _FactorStep:
        """``Ū``, and which factors are skipped."""
        count(self._counts["fallbacks"], space.failed)
        unmagnified, moment = space.whitened([side.gradients() for side in space.sides])
        limit = space.group["update_skipping"]
        kept = torch.ones(len(moment), dtype=moment.dtype, device=moment.device)
        if limit:
            mean_square = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
            kept = (mean_square <= limit**2).to(moment.dtype)
            count(self._counts["skipped"], kept == 0)
        return _FactorStep(space, unmagnified, moment, kept)

    def _clip(self, works: list[_FactorStep]) -> None:
        """Scale ``Ū`` by the one norm of all pairs of all groups."""
        if not works:
            return
        device = works[0].space.device
        squares = []
        for work in works:
            square = work.moment.diagonal(dim1=-2, dim2=-1).sum(-1) * work.space.lengths()[:, 0, 0]
            squares.append(torch.where(work.kept > 0, square, 0.0).sum().to(device))
        norm = torch.stack(squares).sum().sqrt()
        limits = {work.space.group["clip_unmagnified_grad"] for work in works} - {0.0}
        if limits:
            count(self._counts["clipped"], norm > min(limits))
        for work in works:
            limit = work.space.group["clip_unmagnified_grad"]
            if limit:
                work.kept = work.kept * (limit / norm).clamp(max=1.0).to(work.kept.device)

    def _update(self, work: _FactorStep) -> None:
        space, group = work.space, work.space.group
        self._make_states(space)
        steps = space.state(self, STEP).to(space.gram_dtype) + 1
        beta1, beta2 = (corrected_decay(beta, steps)[:, None, None] for beta in group["betas"])
        kept = work.kept[:, None, None]
        P = space.E @ space.state(self, BASIS)
        old = space.state(self, SECOND_MOMENT)
        carried = P @ old @ P.mT
        V = beta2 * carried + (1 - beta2) * kept**2 * work.moment
        escaped = torch.zeros_like(beta2)
        if group["apply_escape"]:
            escaped = beta2 * (space.state(self, ESCAPED)[:, None, None] + escaping(carried, old))
            space.keep(self, ESCAPED, escaped[:, 0, 0])
        identity = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
        eps = group["eps"]
        root, failed = linalg.inverse_root(V + (escaped + eps**2) * identity, eps, space.dtype)
        count(self._counts["fallbacks"], failed)
        sign = -1.0 if group["maximize"] else 1.0
        directions = self._momentum(work, beta1 * P, sign * (1 - beta1) * kept * root)
        space.keep(self, SECOND_MOMENT, linalg.symmetric(V))
        space.keep(self, BASIS, self._descend(space, directions))
        space.keep(self, STEP, steps.float())

    def _momentum(self, work: _FactorStep, carry: Tensor, precondition: Tensor) -> list[Tensor]:
        """``M ← carry·M + precondition·Ū`` by side."""
        space, cap = work.space, work.space.group["update_capping"]
        matrices = zip(space.split(carry.to(space.dtype)), space.split(precondition.to(space.dtype)), strict=True)
        momenta = []
        for side, (old, new), u in zip(space.sides, matrices, work.unmagnified, strict=True):
            M = side.combine(side.product(new, u), old, side.momenta(self, EXP_AVG))
            if cap:
                M = M / (M.square().mean((1, 2), keepdim=True).sqrt() / cap).clamp(min=1.0)
            side.keep_momenta(self, EXP_AVG, M)
            momenta.append(M)
        return momenta

    def _descend(self, space: RankSpace, momenta: list[Tensor]) -> Tensor:
        """Move the factors; ``(k, r, r)``: the partners after the step times their basis before it."""
        crosses: list[Tensor] = []
        size = space.E.shape[-1] ** -space.group["rank_power"]
        norms = [size * math.sqrt(side.length()) for side in space.sides]
        for side, back, M in zip(space.sides, space.split(space.back(norms).to(space.dtype)), momenta, strict=True):
            lr, decay = space.rates(side)
            old = side.stack(side.params)
            new = side.combine(old, back, M, keep=1 - lr * decay, factor=-lr * size)
            crosses.append(side.write(old, new).to(space.gram_dtype))
        moved = torch.cat([crosses[i ^ 1] for i in range(len(crosses))])
        return (space.K + moved) @ space.E.mT

    def _make_states(self, space: RankSpace) -> None:
        for side in space.sides:
            for p in side.params:
                if STEP in self.state[p]:
                    continue
                small = torch.zeros(space.E.shape[1:], dtype=space.gram_dtype, device=space.device)
                self.state[p][STEP] = torch.zeros((), dtype=torch.float32, device=space.device)
                self.state[p][SECOND_MOMENT], self.state[p][BASIS] = small, small.clone()
                self.state[p][ESCAPED] = small[0, 0].clone()

    def _reset(self) -> None:
        super()._reset()
        self._counts: dict[str, dict[torch.device, Any]] = {"clipped": {}, "skipped": {}, "fallbacks": {}}


def corrected_decay(beta: float, steps: Tensor) -> Tensor:
    """``β (1 − β^{t−1})/(1 − β^t)``: a running mean that starts as the plain mean; 0 at ``t = 1``."""
    return beta * (1 - beta ** (steps - 1)) / (1 - beta**steps)


def escaping(carried: Tensor, old: Tensor) -> Tensor:
    """``min(max_i (λ_i(V) − λ_i(PVPᵀ)), tr V − tr PVPᵀ)₊``, ``(k, 1, 1)``: what the new basis does not hold."""
    loss = (linalg.eigenvalues(old) - linalg.eigenvalues(carried)).amax(-1).clamp(min=0)
    trace = (old - carried).diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0)
    return torch.minimum(loss, trace)[:, None, None]


__all__ = ["LoRARITE", "corrected_decay", "escaping"]
