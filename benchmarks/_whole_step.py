"""Time and memory of a whole training step of a UNet with LoRA in bf16: forward, backward, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _inputs import inputs_of
from _unets import config_of, random_unet
from optimizer_step import FUSED, OPTIMIZERS, ratios, settle
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F

from dreamlora.config import Lora
from dreamlora.families.sd import LORA_LAYERS
from dreamlora.lora.fused import FusedLinear
from dreamlora.lora.inject import add_lora
from dreamlora.lora.pairs import adapted_layers

TOKENS = 77
WARM_UP = 2
PLAIN = f"{FUSED}, PEFT's layer"
"""The row with PEFT's own layer; all others have the fused one."""


@dataclass(frozen=True)
class Load:
    """What a step of a model works on: images, and whether activations are computed anew in the backward pass."""

    batch: int
    checkpointing: bool


LOADS = {"sd15": Load(4, False), "sdxl": Load(1, True), "tiny": Load(2, False)}
"""At the size that the model was made for: 512, 1024 and 64 pixels a side."""


class Step:
    """Forward and backward of a model with LoRA, on tensors in memory.

    Args:
        case: model/rank.
        device: where everything lies.
    """

    def __init__(self, case: str, device: str) -> None:
        model, rank = case.split("/")
        self.load = LOADS[model]
        self.unet = random_unet(config_of(model), device, torch.bfloat16)
        add_lora(self.unet, Lora(rank=int(rank)), LORA_LAYERS)
        if self.load.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        layers = [adapted.layer for adapted in adapted_layers(self.unet)]
        self.adapter = nn.ModuleList(nn.ModuleDict({"lora_A": la.lora_A, "lora_B": la.lora_B}) for la in layers)
        side = self.unet.config.sample_size
        self._inputs, self._target = inputs_of(self.unet, self.load.batch, side, TOKENS)
        self._device = device

    def use(self, layer: type[Linear]) -> None:
        """Compute every LoRA layer as this class does."""
        for module in self.unet.modules():
            if type(module) in (Linear, FusedLinear):
                module.__class__ = layer

    def gradients(self) -> None:
        """New gradients of the adapter, in place of the old."""
        for parameter in self.adapter.parameters():
            parameter.grad = None
        with torch.autocast(self._device, torch.bfloat16):
            prediction: Tensor = self.unet(**self._inputs)[0]
        F.mse_loss(prediction.float(), self._target).backward()


def measure(case: str, device: str, rounds: int) -> dict[str, Any]:
    """A step with every optimizer, and with PEFT's layer; all take turns on one model.

    Returns:
        ``optimizers``: as ``optimizer_step.ratios``; ``step_mib``: memory that a step takes beyond weights and states
        of the optimizers, by layer (None on a CPU).
    """
    step = Step(case, device)
    optimizers = {name: make(step.adapter) for name, make in OPTIMIZERS.items()}
    optimizers[PLAIN] = optimizers[FUSED]
    times: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, list[float]] = defaultdict(list)
    for number in range(WARM_UP + rounds):
        for name, optimizer in optimizers.items():
            if number == WARM_UP:
                settle(optimizer)
            step.use(Linear if name == PLAIN else FusedLinear)
            ms, mib = _cost(lambda optimizer=optimizer: (step.gradients(), optimizer.step()), device)
            times[name].append(ms)
            peaks[name].append(mib)
    return {
        "batch": step.load.batch,
        "pixels": 8 * step.unet.config.sample_size,
        "checkpointing": step.load.checkpointing,
        "pairs": len(step.adapter),
        "optimizers": ratios({name: values[WARM_UP:] for name, values in times.items()}),
        "step_mib": {
            layer: round(max(peaks[name][WARM_UP:])) if device == "cuda" else None
            for layer, name in (("fused", FUSED), ("peft", PLAIN))
        },
    }


def _cost(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Milliseconds, and MiB on top of what was allocated before (0 on a CPU)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    work()
    if device != "cuda":
        return 1e3 * (time.perf_counter() - started), 0.0
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started), (torch.cuda.max_memory_allocated() - before) / 2**20
