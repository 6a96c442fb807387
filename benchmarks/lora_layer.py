"""Time that a LoRA layer costs besides its arithmetic: PEFT's layer and the fused one, on tensors too small to count.

    python benchmarks/lora_layer.py
    python benchmarks/lora_layer.py --device cuda

A stack of layers goes forwards and backwards, in bf16 under autocast as in training, and in float32; the two kinds take
turns. On a CPU that is the time of Python and of torch's dispatch, which a GPU waits for where its kernels are shorter.
Writes results/lora_layer_<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import _cli
import _machine
import torch
from peft.tuners.lora import Linear
from torch import nn

from dreamlora.config import Lora
from dreamlora.lora.fused import FusedLinear
from dreamlora.lora.inject import add_lora

KINDS = {"peft": Linear, "fused": FusedLinear}


class Stack(nn.Module):
    """Linear layers, one after the other."""

    def __init__(self, layers: int, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(layers)))

    def add_adapter(self, config: Any, adapter_name: str) -> None:
        """As diffusers' models do."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self, adapter_name)


def measure(device: str, dtype: torch.dtype, layers: int, size: int, rounds: int) -> dict[str, float]:
    """Median microseconds per layer, by kind; and how many times PEFT's the fused one is."""
    clock = time.perf_counter if device == "cuda" else time.process_time  # other programs do not count
    torch.manual_seed(0)
    stack = Stack(layers, size).to(device, dtype).requires_grad_(False)
    names = tuple(f"layers.{number}" for number in range(layers))
    add_lora(stack, Lora(rank=4), names)
    x = torch.randn(4, size, device=device, dtype=dtype)
    loras = [module for module in stack.modules() if isinstance(module, Linear)]
    times: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(3 + rounds):
        for name, kind in KINDS.items():
            for lora in loras:
                lora.__class__ = kind
            started = clock()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = stack.layers(x)
            y.sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e6 * (clock() - started) / layers)
    medians = {name: round(statistics.median(values[3:]), 1) for name, values in times.items()}
    return {**medians, "fused_times_peft": round(medians["fused"] / medians["peft"], 2)}


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        str(dtype).removeprefix("torch."): measure(given.device, dtype, given.layers, given.size, given.rounds)
        for dtype in (torch.float32, torch.bfloat16)
    }
    result = {
        "command": _machine.command("lora_layer.py"),
        "machine": _machine.describe(1),
        "microseconds_per_layer": found,
    }
    print(_machine.write(f"lora_layer_{given.device}", result))


if __name__ == "__main__":
    _cli.start(main)
