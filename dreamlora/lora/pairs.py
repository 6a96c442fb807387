"""The adapted layers of a model: found here and nowhere else. Those with a pair of factors have one record each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamlora.lora import offset
from dreamlora.lora.offset import FrozenStart
from dreamlora.precision import dense_weight

ADAPTER = "default"
"""Name of the adapter that trains."""


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer with a LoRA, ``W = W₀ + scaling · ΔW``, as it was when it was found. ΔW is B A, or ``B A − B₀ A₀``.

    With a DoRA each row of this W is then scaled to its magnitude.

    The first four are what ``optimizers.LoraPair`` has, which knows neither PEFT nor frozen starts.

    Attributes:
        name: path in the module that was searched.
        A: weight of lora_A: ``(r, n)``, of a convolution ``(r, c, *kernel)``.
        B: weight of lora_B: ``(m, r)``, of a convolution ``(m, r, 1, 1)``.
        scaling: ``alpha / r``, or ``alpha / √r``.
        start: A₀ and B₀, for a LoRA that started away from zero.
        layer: PEFT's; its ``base_layer`` is the model's own.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    start: FrozenStart | None
    layer: Any

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(r, n)`` and ``(m, r)`` of the flattened factors; grouped convolutions have fewer columns in B."""
        return (self.rank, self.A[0].numel()), (self.B.shape[0], self.B[0].numel())

    @property
    def entries(self) -> int:
        """Of ΔW."""
        return self.B.shape[0] * self.A[0].numel()

    @property
    def magnitude(self) -> nn.Parameter | None:
        """A DoRA's lengths of W's rows, ``(m,)`` or of a convolution ``(1, m, 1, 1)``."""
        magnitudes = self.layer.lora_magnitude_vector
        return magnitudes[ADAPTER].weight if ADAPTER in magnitudes else None

    def base_lengths(self) -> Tensor:
        """Of W₀'s rows, in the shape of a DoRA's magnitudes, to the last bit as its forward pass computes them: that of
        PEFT takes linear weights to float32 (as its input is), and leaves convolutions in half precision.
        """
        weight = dense_weight(self.layer.base_layer, device=self.A.device).detach()
        half = weight.dtype in (torch.float16, torch.bfloat16)
        plain = weight.float() if weight.ndim == 2 else weight
        as_trained = torch.autocast(weight.device.type, weight.dtype) if half and not weight.is_meta else nullcontext()
        with as_trained:
            lengths: Tensor = self.layer.lora_magnitude_vector[ADAPTER].get_weight_norm(
                plain, torch.zeros_like(plain), 1.0
            )
        return lengths.float()

    def reset_magnitude(self) -> None:
        """Make a DoRA's magnitudes those of W₀."""
        if self.magnitude is not None:
            self.magnitude.data = self.base_lengths().to(self.magnitude.device)

    def silence(self) -> None:
        """Take the layer's effect away, to the last bit."""
        if self.start is None:
            self.B.data.zero_()
        else:
            self.A.data.copy_(self.start.A)
            self.B.data.copy_(self.start.B)
        self.reset_magnitude()

    def factors(self) -> tuple[Tensor, Tensor]:
        """``down (k, n, ...)`` and ``up (m, k, ...)`` of ΔW = up·down: k is r, or 2r with a frozen start."""
        A, B = self.A.detach(), self.B.detach()
        return (A, B) if self.start is None else (self.start.down(A), self.start.up(B))

    def with_start(self, A: Tensor, B: Tensor) -> Self:
        """Make the layer count its distance from B₀ A₀ instead of B A; A and B themselves are left as they are.

        Args:
            A, B: A₀ and B₀ in the shapes of A and B; copied.
        """
        start = FrozenStart(A.to(self.A.device), B.to(self.A.device))
        offset.attach(self.layer, ADAPTER, start)
        return replace(self, start=start)


def adapted_layers(module: nn.Module, prefix: str = "") -> Iterator[AdaptedLayer]:
    """Every layer of ``module`` with a pair of factors, in module order, whatever DDP or torch.compile put around it.

    Args:
        prefix: of the names, as in ``named_modules``.
    """
    for name, layer in bare(module).named_modules(prefix=prefix):
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
            A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            yield AdaptedLayer(name, A, B, float(layer.scaling[ADAPTER]), offset.start_of(layer), layer)


@dataclass(frozen=True)
class TunedLayer:
    """One layer with an adapter of any kind.

    Attributes:
        name: path in the module that was searched.
        rank, scaling: as PEFT has them.
        given: the alpha that it was told, which rsLoRA divides by the root of the rank.
        parameters: of the adapter, by PEFT's names such as "hada_w1_a"; a LoRA's are "lora_A" and "lora_B".
        pair: what is known of a layer with a pair of factors; None: it has none.
        layer: PEFT's; its ``base_layer`` is the model's own.
    """

    name: str
    rank: int
    scaling: float
    given: float
    parameters: dict[str, nn.Parameter]
    pair: AdaptedLayer | None
    layer: Any

    @property
    def alpha(self) -> float:
        """That the update is scaled by alpha / rank, whatever it was given as."""
        return self.scaling * self.rank

    def silence(self) -> None:
        """Take the layer's effect away, to the last bit."""
        if self.pair is not None:
            self.pair.silence()
        else:
            for parameter in self.parameters.values():
                parameter.data.zero_()


def is_adapted(part: Any) -> bool:
    """Whether a part of a pipeline has adapters, of whatever name."""
    return isinstance(part, nn.Module) and any(isinstance(layer, BaseTunerLayer) for layer in part.modules())


def tuned_layers(module: nn.Module, prefix: str = "") -> Iterator[TunedLayer]:
    """Every layer of ``module`` with the adapter, of whatever kind; else as ``adapted_layers``."""
    pairs = {pair.name: pair for pair in adapted_layers(module, prefix)}
    for name, layer in bare(module).named_modules(prefix=prefix):
        if not isinstance(layer, LoraLayer | LycorisLayer) or ADAPTER not in layer.scaling:
            continue
        held = {kind: getattr(layer, kind) for kind in layer.adapter_layer_names}
        found = {kind: of_kind[ADAPTER] for kind, of_kind in held.items() if ADAPTER in of_kind}
        parameters = {kind: getattr(each, "weight", each) for kind, each in found.items()}
        alphas = layer.lora_alpha if isinstance(layer, LoraLayer) else layer.alpha
        rank, scaling, given = layer.r[ADAPTER], float(layer.scaling[ADAPTER]), float(alphas[ADAPTER])
        yield TunedLayer(name, rank, scaling, given, parameters, pairs.get(name), layer)


def reset_magnitudes(module: nn.Module) -> None:
    """Make all magnitudes of a DoRA those of the base weights; PEFT rounds them to the precision of these."""
    for layer in adapted_layers(module):
        layer.reset_magnitude()


def put_factors(layer: Any, A: Tensor, B: Tensor, alpha: float, adapter: str = ADAPTER) -> None:
    """Give PEFT's layer factors of another rank and another alpha.

    Args:
        layer: with the adapter.
        A, B: in the shapes of ``AdaptedLayer``; taken over as float32.
        alpha: of ``alpha / r``, which counts from the next ``set_adapters`` or ``set_scale`` on.
        adapter: its name.
    """
    for part, value in ((layer.lora_A[adapter], A), (layer.lora_B[adapter], B)):
        part.weight.data = value.detach().to(part.weight.device, torch.float32)
    layer.r[adapter], layer.lora_alpha[adapter] = len(A), alpha


def layers_below_rank(module: nn.Module) -> tuple[int, int]:
    """How many adapted layers have fewer inputs or outputs than ranks, and how many there are."""
    layers = list(adapted_layers(module))
    return sum(layer.rank > min(layer.shapes[0][1], layer.shapes[1][0]) for layer in layers), len(layers)


def starts_of(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """All frozen starts by layer, on the CPU, for a checkpoint."""
    starts = ((layer.name, layer.start) for layer in adapted_layers(module))
    return {name: {"A": start.A.cpu(), "B": start.B.cpu()} for name, start in starts if start is not None}


def restore_starts(module: nn.Module, saved: dict[str, dict[str, Tensor]]) -> None:
    """Give the layers what ``starts_of`` gave."""
    for layer in adapted_layers(module):
        if layer.name in saved:
            layer.with_start(**saved[layer.name])


def device_of(module: nn.Module) -> torch.device:
    """Where a model computes: its first layer is in no block that waits in host memory."""
    return next(module.parameters()).device


def bare(module: nn.Module) -> Any:
    """The model inside the wrappers of DDP and torch.compile; for its config and layers, not for calling it."""
    while True:
        inner = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner
