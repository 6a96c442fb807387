"""torch's own AdamW and SGD updates, applied to directions instead of ``p.grad``.

Calling torch's functional forms (the fused kernels where there are some) keeps bias correction, weight decay and speed
those of ``torch.optim.AdamW`` and ``torch.optim.SGD`` by construction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from dreamlora.linalg import gram_dtype
from dreamlora.optimizers._scaled_options import BiasCorrection

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_FUSED_DEVICES = ("cpu", "cuda")
STEP, EXP_AVG, EXP_AVG_SQ, MOMENTUM = "step", "exp_avg", "exp_avg_sq", "momentum_buffer"


@dataclass(frozen=True)
class AdamWHyper:
    """Hyper-parameters of one AdamW update, named as in ``torch.optim.AdamW``."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    maximize: bool


@dataclass(frozen=True)
class SGDHyper:
    """Hyper-parameters of one SGD update; weight decay is decoupled, unlike ``torch.optim.SGD``'s."""

    lr: float | Tensor
    momentum: float
    weight_decay: float
    maximize: bool


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of states and arithmetic: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 matrices on CUDA in float32, even where the program allows TF32 for its model.

    In TF32 weak directions of a Gram matrix are lost, and iterations for its root may diverge.
    """
    matmul: Any = torch.backends.cuda.matmul
    setting: tuple[str, Any] = ("allow_tf32", False)
    try:
        before = matmul.allow_tf32
    except RuntimeError:  # the program has set fp32_precision, and torch takes no mix of the two
        setting, before = ("fp32_precision", "ieee"), matmul.fp32_precision
    setattr(matmul, *setting)
    try:
        yield
    finally:
        setattr(matmul, setting[0], before)


@dataclass
class _Work:
    """Tensors ready for a kernel: parameters of at least float32, directions of the same dtype and strides."""

    params: list[Tensor]
    directions: list[Tensor]
    fused: bool

    @classmethod
    def of(cls, params: list[Tensor], directions: list[Tensor]) -> _Work:
        low = any(p.dtype in _LOW_PRECISION for p in params)
        work = [p.to(compute_dtype(p.dtype)) for p in params] if low else params
        # The fused kernels walk the memory of all tensors alike: a channels_last parameter needs its direction so.
        aligned = [
            d if d.dtype == p.dtype and d.stride() == p.stride() else torch.empty_like(p).copy_(d)
            for p, d in zip(work, directions, strict=True)
        ]
        return cls(work, aligned, all(p.device.type in _FUSED_DEVICES for p in work))

    def write_back(self, params: list[Tensor]) -> None:
        """Round low-precision parameters back; the others were updated in place."""
        if self.params is params:
            return
        for p, updated in zip(params, self.params, strict=True):
            if p is not updated:
                p.copy_(updated)


def adamw_(params: list[Tensor], directions: list[Tensor], states: list[dict[str, Any]], hyper: AdamWHyper) -> None:
    """One AdamW step along ``directions`` (in place of gradients), updating ``params`` and ``states``.

    Args:
        params: parameters of any floating dtype; below float32 they are updated in float32 and rounded.
        directions: same shapes, any strides.
        states: per parameter; ``step``, ``exp_avg``, ``exp_avg_sq`` are made when missing.
    """
    if not params:
        return
    work = _Work.of(params, directions)
    _start_moments(work.params, states)
    adamw(
        work.params,
        work.directions,
        [state[EXP_AVG] for state in states],
        [state[EXP_AVG_SQ] for state in states],
        [],
        [state[STEP] for state in states],
        fused=work.fused,
        amsgrad=False,
        beta1=hyper.betas[0],
        beta2=hyper.betas[1],
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        maximize=hyper.maximize,
    )
    work.write_back(params)


def published_adamw_(
    params: list[Tensor],
    directions: list[Tensor],
    states: list[dict[str, Any]],
    hyper: AdamWHyper,
    bias_correction: BiasCorrection,
) -> None:
    """One step of an AdamW in the code of arXiv 2402.02347, with ``adamw_``'s arguments and states.

    ``p ← p − η · step``, then ``p ← p − η·wd·p``: unlike in torch the weight decays after the update. The step is

    * torch: ``m̂/(√v̂ + ε)`` with ``m̂ = m/(1−β₁ᵗ)``, ``v̂ = v/(1−β₂ᵗ)``;
    * folded: ``√(1−β₂ᵗ)/(1−β₁ᵗ) · m/(√v + ε)``, so that ``ε`` is not divided by the bias correction;
    * none: ``m/(√v + ε)``.
    """
    if not params:
        return
    work = _Work.of(params, directions)
    _start_moments(work.params, states)
    first, second = hyper.betas
    signed = torch._foreach_neg(work.directions) if hyper.maximize else work.directions
    steps, means, squares = ([state[key] for state in states] for key in (STEP, EXP_AVG, EXP_AVG_SQ))
    torch._foreach_add_(steps, 1)
    torch._foreach_lerp_(means, signed, 1 - first)
    torch._foreach_mul_(squares, second)
    torch._foreach_addcmul_(squares, signed, signed, 1 - second)
    # β₂ᵗ is close to 1, and its difference from 1 counts.
    t = torch.stack(steps).to(gram_dtype(steps[0].device))
    of_mean, of_root = 1 - first**t, (1 - second**t).sqrt()
    if bias_correction == "none":
        of_mean, of_root = torch.ones_like(t), torch.ones_like(t)
    divisors = torch._foreach_sqrt(squares)
    if bias_correction == "torch":
        torch._foreach_div_(divisors, list(of_root.unbind()))
        of_root = torch.ones_like(t)
    torch._foreach_add_(divisors, hyper.eps)
    moves = torch._foreach_div(means, divisors)
    torch._foreach_mul_(moves, list((of_root / of_mean * hyper.lr).unbind()))
    torch._foreach_sub_(work.params, moves)
    torch._foreach_mul_(work.params, 1 - as_number(hyper.lr) * hyper.weight_decay)
    work.write_back(params)


def move_(params: list[Tensor], moves: list[Tensor], shrink: float | Tensor) -> None:
    """``p ← shrink · p + move``; below float32 in float32, then rounded."""
    if not params:
        return
    work = _Work.of(params, moves)
    torch._foreach_mul_(work.params, shrink)
    torch._foreach_add_(work.params, work.directions)
    work.write_back(params)


def as_number(lr: float | Tensor) -> float | Tensor:
    """A tensor on the CPU as a number; one on a GPU is left there, as reading it would wait for the GPU."""
    return float(lr) if not isinstance(lr, Tensor) or lr.device.type == "cpu" else lr


def _start_moments(params: list[Tensor], states: list[dict[str, Any]]) -> None:
    for p, state in zip(params, states, strict=True):
        if STEP not in state:
            state[STEP] = torch.zeros((), dtype=torch.float32, device=p.device)
            state[EXP_AVG], state[EXP_AVG_SQ] = torch.zeros_like(p), torch.zeros_like(p)


def sgd_(params: list[Tensor], directions: list[Tensor], states: list[dict[str, Any]], hyper: SGDHyper) -> None:
    """``p ← (1 − lr·wd) p;  b ← momentum·b + direction;  p ← p − lr·b``, updating ``params`` and ``states``.

    Args:
        params: parameters of any floating dtype; below float32 they are updated in float32 and rounded.
        directions: same shapes.
        states: per parameter; ``momentum_buffer`` is made when missing and momentum is used.
    """
    if not params:
        return
    work = _Work.of(params, directions)
    buffers: list[Tensor | None] = [None] * len(params)
    if hyper.momentum:
        buffers = [
            state[MOMENTUM] if MOMENTUM in state else state.setdefault(MOMENTUM, torch.zeros_like(p))
            for p, state in zip(work.params, states, strict=True)
        ]
    lr = float(hyper.lr)
    if hyper.weight_decay:
        torch._foreach_mul_(work.params, 1 - lr * hyper.weight_decay)
    sgd(
        work.params,
        work.directions,
        buffers,
        fused=work.fused,
        weight_decay=0.0,
        momentum=hyper.momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=hyper.maximize,
    )
    work.write_back(params)
