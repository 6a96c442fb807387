"""PEFT's own starts, computed on a float32 copy of one layer's weight at a time."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dreamlora import linalg
from dreamlora.inits._start import Start, Target
from dreamlora.lora.pairs import adapted_layers


def peft_start(target: Target, kind: str, least: int) -> Start:
    """What PEFT's ``init_lora_weights=kind`` gives for the layer.

    PEFT subtracts B₀ A₀ from the base in the base's precision, and knows Linear layers only. So it is handed a Linear
    layer with a float32 copy of the weight (of convolutions the flattened kernel, which is what B·A is added to); the
    copy is thrown away.

    Args:
        target: the layer.
        kind: PEFT's name of the init.
        least: inputs and outputs that the layer must have; with fewer PEFT would lower the rank without a word.

    Raises:
        UserError: the layer is too small, quantised, or a grouped convolution.
    """
    m, n = target.size(f"--init {kind.split('_')[0]}", least)
    weight = linalg.decomposable(target.weight())
    copy = nn.Linear(n, m, bias=False, device="meta")
    copy.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(
        r=target.rank,
        lora_alpha=target.scaling * target.rank,
        target_modules=["layer"],
        init_lora_weights=kind,
    )
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():  # PEFT draws from the global stream
        torch.manual_seed(target.seed)
        (started,) = adapted_layers(inject_adapter_in_model(config, nn.ModuleDict({"layer": copy})))
    return Start(started.A.detach(), started.B.detach())
