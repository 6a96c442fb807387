"""torch's Muon on LoRA factors of any shape, with AdamW for the rest."""

from __future__ import annotations

from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._kernels import MOMENTUM, compute_dtype
from dreamlora.optimizers._pairs import Group, LoraPairOptimizer


class FactorMuon(LoraPairOptimizer):
    """``torch.optim.Muon`` on each factor, which takes matrices only: convolutions are flattened for it.

    The pairs only say what is a matrix; each factor is orthogonalised by itself, so the path depends on the
    factorisation.

    Args:
        params: groups of ``lora_param_groups``.
        lr, momentum, nesterov, ns_steps, adjust_lr_fn, weight_decay: as in ``torch.optim.Muon``.
        betas, eps: of the AdamW for groups without pairs.

    Raises:
        ValueError: see ``LoraPairOptimizer``.
        UserError: this torch has no Muon.
    """

    def __init__(  # noqa: PLR0913 - torch.optim's convention: one keyword per hyper-parameter
        self,
        params: list[Group],
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        weight_decay: float = 0.0,
        maximize: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        try:
            from torch.optim._muon import muon
        except ImportError:
            raise UserError("--optimizer muon needs torch 2.9 or newer; lora_muon does not") from None
        self._muon = muon
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        super().__init__(params, {**defaults, **own})

    def validate_group(self, group: Group) -> None:
        super().validate_group(group)
        _checks.fraction("momentum", group["momentum"])
        _checks.switch("nesterov", group["nesterov"])
        _checks.whole_number("ns_steps", group["ns_steps"], 1, _checks.MOST_NS_STEPS)
        _checks.one_of("adjust_lr_fn", group["adjust_lr_fn"], ("original", "match_rms_adamw"))

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        return {MOMENTUM: tuple(p.flatten(1).shape)}

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        lr = float(group["lr"])
        self._update(group, [p for batch in batches for p in batch.A], lr)
        self._update(group, [p for batch in batches for p in batch.B], lr * group["lr_ratio_B"])

    def _update(self, group: Group, params: list[Tensor], lr: float) -> None:
        params = [p for p in params if p.grad is not None]
        work = [p.to(compute_dtype(p.dtype)).flatten(1) for p in params]
        sign = -1 if group["maximize"] else 1
        for p, matrix in zip(params, work, strict=True):
            if MOMENTUM not in self.state[p]:
                self.state[p][MOMENTUM] = matrix.new_zeros(matrix.shape)
        self._muon(
            work,
            [sign * p.grad.to(w.dtype).flatten(1) for p, w in zip(params, work, strict=True) if p.grad is not None],
            [self.state[p][MOMENTUM] for p in params],
            lr=lr,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=(3.4445, -4.7750, 2.0315),
            ns_steps=group["ns_steps"],
            eps=1e-7,
            adjust_lr_fn=group["adjust_lr_fn"],
            has_complex=False,
        )
        for p, updated in zip(params, work, strict=True):
            if updated.data_ptr() != p.data_ptr():  # not a view: another precision or memory format
                p.copy_(updated.view(p.shape))
