"""Singular vectors of the mean gradient of full weights, in the memory of a LoRA.

The gradient Ḡ (m×n) of a layer's weight is never formed. A term ``B A x`` is added to the layer's output. With B = 0 it
adds nothing, and backpropagation gives ``∂L/∂B = G Aᵀ``; with A = 0 it gives ``∂L/∂A = Bᵀ G``. These are the products
that a randomised subspace iteration is made of (Halko, Martinsson and Tropp 2011, algorithm 4.4), and as they are
linear in G they may be summed over draws. So all layers are served by the same passes, at the cost of training a LoRA
of rank ``width``, whatever the base's precision. It is exact if ``width`` reaches min(m, n).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamlora import linalg
from dreamlora.errors import UserError
from dreamlora.inits._start import Probe, Target
from dreamlora.lora.offset import apply_weight

LOSS_SCALE = 4096.0
"""Keeps small gradients from vanishing in fp16; it is divided out again."""


@dataclass(frozen=True)
class SketchPlan:
    """How the decomposition is made.

    Attributes:
        draws: that the gradient is averaged over.
        iterations: power iterations.
        oversampling: width over the 2·rank vectors that are asked for.
    """

    draws: int
    iterations: int
    oversampling: float

    def width(self, target: Target) -> int:
        """Columns of the sketch."""
        (rank, n), (m, _) = target.shapes
        return min(m, n, round(2 * rank * self.oversampling))


def mean_gradient_svd(targets: Sequence[Target], probe: Probe, plan: SketchPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """U ``(m, width)`` and V ``(n, width)`` of the mean gradient of every target, by falling singular value.

    Raises:
        UserError: a gradient is not finite.
    """
    right = [_random(target, plan.width(target)) for target in targets]
    left = _orthonormal(_gradient_times(targets, probe, plan, right))
    for _ in range(plan.iterations):
        right = _orthonormal([product.mT for product in _gradient_times(targets, probe, plan, left, transposed=True)])
        left = _orthonormal(_gradient_times(targets, probe, plan, right))
    for Q, core in zip(left, _gradient_times(targets, probe, plan, left, transposed=True), strict=True):
        left_core, _, Vt = (x.to(core.device) for x in torch.linalg.svd(linalg.decomposable(core), full_matrices=False))
        U = Q @ left_core
        # Signs are arbitrary in pairs; rounding, which differs between numbers of processes, should not choose them.
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        yield U * signs, Vt.mT * signs


def _gradient_times(
    targets: Sequence[Target], probe: Probe, plan: SketchPlan, factors: Sequence[Tensor], *, transposed: bool = False
) -> list[Tensor]:
    """``Ḡ F`` ``(m, k)`` of every target for F ``(n, k)``; transposed: ``Fᵀ Ḡ`` ``(k, n)`` for F ``(m, k)``."""
    count = probe.batches(plan.draws)
    terms = [_Term(target, factor, transposed) for target, factor in zip(targets, factors, strict=True)]
    with contextlib.ExitStack() as cleanup:
        for target, term in zip(targets, terms, strict=True):
            cleanup.callback(target.layer.base_layer.register_forward_hook(term).remove)
        cleanup.enter_context(_without_gradients([p for target in targets for p in (target.A, target.B)]))
        for number in range(probe.rank, count, probe.world):
            (LOSS_SCALE * probe.loss(number)).backward()
    return [term.gradient(probe) / (LOSS_SCALE * count) for term in terms]


class _Term:
    """A forward hook that adds ``B A x = 0`` to a layer's output and so learns a product with its gradient."""

    def __init__(self, target: Target, factor: Tensor, transposed: bool) -> None:
        self._name = target.name
        (_, n), (m, _) = target.shapes
        k = factor.shape[1]
        if transposed:
            self._wanted = torch.zeros(k, n, device=factor.device, requires_grad=True)
            self._down, self._up = self._wanted, factor
        else:
            self._wanted = torch.zeros(m, k, device=factor.device, requires_grad=True)
            self._down, self._up = factor.mT, self._wanted
        self._kernel = target.A.shape[1:]

    def __call__(self, base: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.autocast(output.device.type, enabled=False):  # the products are worth float32
            hidden = apply_weight(base, inputs[0].float(), self._down.reshape(-1, *self._kernel))
            if isinstance(base, nn.Conv2d):
                term = torch.nn.functional.conv2d(hidden, self._up[..., None, None])
            else:
                term = torch.nn.functional.linear(hidden, self._up)
        return output + term.to(output.dtype)

    def gradient(self, probe: Probe) -> Tensor:
        """Summed over all batches of all processes.

        Raises:
            UserError: it is not finite.
        """
        own = torch.zeros_like(self._wanted) if self._wanted.grad is None else self._wanted.grad
        total = probe.total(own)
        if not bool(total.isfinite().all()):
            raise UserError(
                f"--init lora_ga: the gradient of {self._name} is not finite. Try --mixed_precision bf16 instead of "
                "fp16, or another --init"
            )
        return total


@contextlib.contextmanager
def _without_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _random(target: Target, width: int) -> Tensor:
    return torch.randn(target.shapes[0][1], width, generator=target.generator()).to(target.A.device)


def _orthonormal(columns: Sequence[Tensor]) -> list[Tensor]:
    return [torch.linalg.qr(linalg.decomposable(Y)).Q.to(Y.device) for Y in columns]
