"""LoRA-RITE: matrix-preconditioned Adam in coordinates that do not depend on the factorisation (arXiv 2410.20625).

For ``A`` (for ``B`` with the roles swapped), with ``Q = B Eᵀ`` an orthonormal basis of B's columns:

    Ū = E gA = s QᵀG                        gradient in honest units ("unmagnified"), r × n
    P = Q_tᵀ Q_{t−1}                        change of basis since the last step
    V = β₂ P V Pᵀ + (1 − β₂) Ū Ūᵀ / n       second moment, r × r
    M = β₁ P M + (1 − β₁) (V^½ + ε)⁻¹ Ū     momentum of the preconditioned direction
    A ← A − η (Eᵀ M + wd·A)

with ``β = β(1 − β^{t−1})/(1 − β^t)`` in place of a bias correction. What differs from the authors' code (in PyTorch;
the original in JAX was not found):

* no basis is stored, so the state is half of AdamW's: what ``P`` needs is formed while the factors before and after
  the step are both at hand;
* the basis comes from a Cholesky factor instead of QR and pseudo-inverse, and is kept for several steps (``refresh``);
  the root comes from Newton-Schulz iterations instead of eigenvalues; all pairs of a rank at once;
* by default the step of A is bounded where B has hardly any length (``trust``), without which runs from B = 0 with
  more ranks than gradient directions learn little; ``trust=0`` is their step;
* convolutions, bfloat16 parameters, AdamW for parameters outside of pairs, and counters of what was clipped.

Nothing else may change the factors between two steps (an average of weights must put them back).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamlora import linalg
from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import EXP_AVG, STEP
from dreamlora.optimizers._pairs import Group
from dreamlora.optimizers._rank_space import BACK, WHITENING, Coordinates, RankSpace, rank_spaces
from dreamlora.optimizers._refresh import RefreshingOptimizer
from dreamlora.optimizers._roots import inverse_root

SECOND_MOMENT, BASIS, ESCAPED = "second_moment", "basis", "escaped"


@dataclass
class _FactorStep:
    """One rank space in the middle of a step.

    Attributes:
        space: the factors.
        at: where the partners stand, if that is looked at in this step.
        again: whether it is in the next.
        unmagnified: ``Ū`` by side.
        moment: ``Ū Ūᵀ / n`` ``(k, r, r)``.
        kept: ``(k, 1, 1)``: what ``Ū`` is multiplied by: 0 where the update is skipped, below 1 where it is clipped.
    """

    space: RankSpace
    at: Coordinates | None
    again: bool
    unmagnified: list[Tensor]
    moment: Tensor
    kept: Tensor


class LoRARITE(RefreshingOptimizer):
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
            the default, is never (their 1 can silently stop layers; ``stats`` counts).
        update_capping: bound of the root mean square of ``M``; 0 is none.
        apply_escape: keep second moment that leaves the basis as a multiple of the identity.
        scale_correction: divide steps by ``s``, so that lr does not depend on alpha.
        trust: by how much of its length a step may change a direction of A; 0, as theirs, is without bound.
        refresh: the basis of the partners serves for so many steps, after the first 20, which make it anew each; 1, as
            theirs, always does.
        rank_power, layer_power: by which steps get shorter the larger the rank is, and the more pairs there are, as in
            ``LoRAMuon``; 0, as theirs, is not at all.
        maximize: ascend.

    Raises:
        ValueError: see ``LoraPairOptimizer``.
    """

    COUNTERS = ("clipped", "skipped", "fallbacks")
    """Steps in which the unmagnified gradients were clipped; factors' updates skipped as too large, and left out."""

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
        refresh: int = 4,
        rank_power: float = 0.0,
        layer_power: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        bounds = {"clip_unmagnified_grad": clip_unmagnified_grad, "update_skipping": update_skipping}
        own = {"update_capping": update_capping, "apply_escape": apply_escape, "scale_correction": scale_correction}
        own |= {
            "rank_power": rank_power,
            "layer_power": layer_power,
            "trust": trust,
            "refresh": refresh,
            "damping": 0.0,
        }
        super().__init__(params, {**defaults, **bounds, **own})

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        bounds = ("clip_unmagnified_grad", "update_skipping", "update_capping", "trust")
        for name in (*bounds, "rank_power", "layer_power"):
            _checks.at_least_zero(name, group[name])
        _checks.switch("apply_escape", group["apply_escape"])

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        square = (rank, rank)
        made = dict.fromkeys((SECOND_MOMENT, BASIS, WHITENING, BACK), square)
        return {STEP: (), EXP_AVG: tuple(p.shape), **made, ESCAPED: ()}

    def state_dtype(self, key: str, p: Tensor) -> torch.dtype:
        small = key in (SECOND_MOMENT, BASIS, ESCAPED)
        return linalg.gram_dtype(p.device) if small else super().state_dtype(key, p)

    def update_all_pairs(self, work: list[tuple[Group, list[PairBatch]]]) -> None:
        """Whiten all gradients, clip them together, then update."""
        works = []
        for group, batches in work:
            due, again = self.begin_step(group, batches)
            works += [self._begin(space, due, again) for space in rank_spaces(group, batches, self.pair_count)]
        self._clip(works)
        for each in works:
            self._update(each)

    def _begin(self, space: RankSpace, due: bool, again: bool) -> _FactorStep:
        """``Ū``, and which factors are skipped."""
        at = self._turn(space) if due else None
        gradients = [torch.stack(side.gradients()).flatten(2) for side in space.sides]
        unmagnified, moment = space.whitened(gradients, space.matrix(self, WHITENING))
        moment = moment / space.per_factor([float(side.length()) for side in space.sides]).to(space.dtype)
        limit = space.group["update_skipping"]
        kept = torch.ones(len(moment), 1, 1, dtype=moment.dtype, device=moment.device)
        if limit:
            kept = (linalg.mean_eigenvalue(moment) <= limit**2).to(moment.dtype)
            self.count("skipped", kept == 0)
        return _FactorStep(space, at, again, unmagnified, moment, kept)

    def _turn(self, space: RankSpace) -> Coordinates:
        """Look where the partners stand, and carry the moments to their coordinates."""
        at = space.coordinates()
        self.count("fallbacks", at.failed)
        basis, old = self._small(space, BASIS), self._small(space, SECOND_MOMENT)
        P = at.whitening @ basis
        carried = linalg.symmetric(P @ old @ P.mT)
        if space.group["apply_escape"]:
            escaped = self._small(space, ESCAPED, ())
            escaped += escaping(carried, old)[:, 0, 0]
        space.keep(self, SECOND_MOMENT, carried, space.gram_dtype)
        space.keep(self, WHITENING, at.whitening)
        for side, T in zip(space.sides, space.split(P.to(space.dtype)), strict=True):
            M = side.state(self, EXP_AVG)
            M.copy_(side.product(T, M.flatten(2)).view(M.shape))
        return at

    def _clip(self, works: list[_FactorStep]) -> None:
        """Scale ``Ū`` by the one norm of all pairs of all groups."""
        limits = {work.space.group["clip_unmagnified_grad"] for work in works} - {0.0}
        if not limits:
            return
        device = works[0].space.device
        squares = []
        for work in works:
            lengths = work.space.per_factor([float(side.length()) for side in work.space.sides])
            square = linalg.mean_eigenvalue(work.moment) * work.space.rank * lengths
            squares.append(torch.where(work.kept > 0, square, 0.0).sum().to(device))
        norm = torch.stack(squares).sum().sqrt()
        self.count("clipped", norm > min(limits))
        for work in works:
            limit = work.space.group["clip_unmagnified_grad"]
            if limit:
                work.kept = work.kept * (limit / norm).clamp(max=1.0).to(work.kept.device, work.kept.dtype)

    def _update(self, work: _FactorStep) -> None:
        space, group = work.space, work.space.group
        steps = space.state(self, STEP, (), torch.float32)
        steps += 1
        t = steps.to(space.gram_dtype)
        beta1, beta2 = (corrected_decay(beta, t)[:, None, None] for beta in group["betas"])
        V = self._small(space, SECOND_MOMENT)
        V.mul_(beta2).add_((work.kept**2 * work.moment).to(V.dtype) * (1 - beta2))
        escaped = self._small(space, ESCAPED, ())
        if group["apply_escape"]:
            escaped *= beta2[:, 0, 0]
        if work.at is not None:
            norms = [space.size * math.sqrt(side.length()) for side in space.sides]
            space.keep(self, BACK, space.size * space.back(work.at, norms))
        # not kept for several steps: a direction that is new in V would be enlarged without bound
        identity = torch.eye(space.rank, dtype=V.dtype, device=V.device)
        mean = V + (escaped[:, None, None] + group["eps"] ** 2) * identity
        root, failed = inverse_root(mean, group["eps"], space.dtype)
        self.count("fallbacks", failed)
        sign = -1.0 if group["maximize"] else 1.0
        precondition = sign * (1 - beta1).to(space.dtype) * work.kept * root.to(space.dtype)
        self._descend(work, self._momentum(work, beta1.to(space.dtype), precondition))

    def _momentum(self, work: _FactorStep, carry: Tensor, precondition: Tensor) -> list[Tensor]:
        """``M ← carry·M + precondition·Ū`` by side."""
        space, cap = work.space, work.space.group["update_capping"]
        matrices = zip(space.split(carry), space.split(precondition), strict=True)
        momenta = []
        for side, (old, new), u in zip(space.sides, matrices, work.unmagnified, strict=True):
            M = side.state(self, EXP_AVG).flatten(2)
            left, right = (new, u) if side.wide else (u, new.mT)
            M.mul_(old).baddbmm_(left, right)
            if cap:
                M.div_((M.square().mean((1, 2), keepdim=True).sqrt() / cap).clamp(min=1.0))
            momenta.append(M)
        return momenta

    def _descend(self, work: _FactorStep, momenta: list[Tensor]) -> None:
        """Move the factors; note the basis that the moments are in, for the step that carries them to another."""
        space, at = work.space, work.at
        follow = at is not None and work.again
        before = [side.stack(space.gram_dtype) for side in space.sides] if follow else []
        for side, back, M in zip(space.sides, space.split(space.matrix(self, BACK)), momenta, strict=True):
            lr, decay = space.rates(side)
            side.move(back, M, keep=1 - decay, factor=-lr)
        if at is None:
            return
        partners = at.K
        if follow:
            # in full precision: coordinates of weak directions magnify what is lost here by the root of rounding_level
            now = (side.stack(space.gram_dtype) for side in space.sides)
            crosses = [side.gram(x, y) for side, x, y in zip(space.sides, now, before, strict=True)]
            partners = torch.where(at.failed[:, None, None], 0.0, space.of_partners(torch.cat(crosses)))
        # Several steps later, the partners of this step stand for those of the last: directions that grew meanwhile
        # shorten the moments, and never lengthen them.
        space.keep(self, BASIS, partners @ at.whitening.mT, space.gram_dtype)

    def _small(self, space: RankSpace, key: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A state in the precision of Gram matrices: an ``r × r`` matrix of every factor, or of another shape."""
        return space.state(self, key, (space.rank, space.rank) if shape is None else shape, space.gram_dtype)


def corrected_decay(beta: float, steps: Tensor) -> Tensor:
    """``β (1 − β^{t−1})/(1 − β^t)``: a running mean that starts as the plain mean; 0 at ``t = 1``."""
    return beta * (1 - beta ** (steps - 1)) / (1 - beta**steps)


def escaping(carried: Tensor, old: Tensor) -> Tensor:
    """``min(max_i (λ_i(V) − λ_i(PVPᵀ)), tr V − tr PVPᵀ)₊``, ``(k, 1, 1)``: what the new basis does not hold."""
    loss = (linalg.eigenvalues(old) - linalg.eigenvalues(carried)).amax(-1).clamp(min=0)
    trace = (old - carried).diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0)
    return torch.minimum(loss, trace)[:, None, None]


__all__ = ["LoRARITE", "corrected_decay", "escaping"]
