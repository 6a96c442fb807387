"""What --compile and --channels_last do to a training step: forward and backward of models with a LoRA.

    python benchmarks/compile_step.py
    python benchmarks/compile_step.py --device cuda --cases unet dit sd15 --rounds 20

"tiny" is the embedded model's UNet; "unet" one like SDXL's and "dit" a transformer like FLUX.2's with a few million
weights; "sd15" and "sdxl" have the size of the real models. All weights are random. Ways of computing take turns on
copies of one model. A CPU's figures are those of one thread, and of its own time, so that other programs do not count.
Writes results/compile_step_<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import _cli
import _machine
import torch
from _unets import config_of, random_unet
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dreamlora.config import Lora
from dreamlora.lora.inject import add_lora
from dreamlora.models.compiling import compile_blocks

UNET: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 4),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "cross_attention_dim": 256,
}
DIT: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 6,
    "attention_head_dim": 64,
    "num_attention_heads": 6,
    "joint_attention_dim": 256,
    "axes_dims_rope": (16, 16, 16, 16),
    "guidance_embeds": False,
}
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
PLAIN, COMPILED, INNERMOST = "plain", "compiled", "channels_last"
WARM_UP = 2


def models(case: str, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A frozen denoiser and what it is called with."""
    torch.manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    if case == "dit":
        model = Flux2Transformer2DModel(**DIT).to(device, dtype).requires_grad_(False)
        places = [torch.zeros(count, 4, device=device) for count in (256, 64)]
        inputs = {"hidden_states": noise(1, 256, 64), "encoder_hidden_states": noise(1, 64, 256)}
        time_ = {"timestep": torch.tensor([0.5], device=device), "guidance": None}
        return model, {**inputs, **time_, "img_ids": places[0], "txt_ids": places[1]}
    unet = random_unet(UNET if case == "unet" else config_of(case), device, dtype)
    config, side = unet.config, unet.config.sample_size
    inputs = {
        "sample": noise(1, config.in_channels, side, side),
        "encoder_hidden_states": noise(1, 77, config.cross_attention_dim),
        "timestep": torch.tensor([500], device=device),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": noise(1, pooled), "time_ids": noise(1, 6)}
    return unet, inputs


def measure(case: str, device: str, checkpointing: bool, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a step by way of computing, as times the plain one; of --compile what it costs besides."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plain, inputs = models(case, device, dtype)
    ways = {PLAIN: plain, COMPILED: copy.deepcopy(plain)}
    if case != "dit":
        ways[INNERMOST] = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for model in ways.values():
        add_lora(model, Lora(rank=16), LAYERS)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(ways[COMPILED], shapes=1)
    started = time.perf_counter()
    _step(ways[COMPILED], inputs, device, dtype)
    first = time.perf_counter() - started
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(WARM_UP + rounds):
        for way, model in ways.items():
            times[way].append(_ms(lambda model=model: _step(model, inputs, device, dtype), device))
    medians = {way: statistics.median(values[WARM_UP:]) for way, values in times.items()}
    return {
        "plain_ms": round(medians[PLAIN], 1),
        **{f"{way}_times_plain": round(ms / medians[PLAIN], 3) for way, ms in medians.items() if way != PLAIN},
        "first_compiled_step_s": round(first, 1),
        "graphs": counters["stats"]["unique_graphs"],
        "gaps": sum(counters["graph_break"].values()),
    }


def _step(model: nn.Module, inputs: dict[str, Any], device: str, dtype: torch.dtype) -> None:
    model.zero_grad()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        prediction = model(**inputs)[0]
    prediction.float().square().mean().backward()


def _ms(work: Callable[[], None], device: str) -> float:
    if device == "cpu":
        started = time.process_time()
        work()
        return 1e3 * (time.process_time() - started)
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Parse the flags, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", nargs="+", choices=["tiny", "unet", "dit", "sd15", "sdxl"], default=None)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True  # or a second run of this would find what the first has made
    found: dict[str, Any] = {}
    for case in given.cases or ["tiny", "unet", "dit"]:
        for checkpointing in (False, True):
            name = f"{case}, checkpointing" if checkpointing else case
            found[name] = measure(case, given.device, checkpointing, given.rounds)
            print(name, found[name], flush=True)
    result = {"command": _machine.command("compile_step.py"), "machine": _machine.describe(1), "steps": found}
    print(_machine.write(f"compile_step_{given.device}", result))


if __name__ == "__main__":
    _cli.start(main)
