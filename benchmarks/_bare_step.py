"""The step that a training program cannot be faster than: forward, backward and fused AdamW on tensors in memory.

    python benchmarks/_bare_step.py MODEL_FOLDER --steps 200 --batch 4 --rank 8

The LoRA model is that of the programs it is compared with, made by diffusers and PEFT; nothing is read, drawn, clipped,
checked, logged or saved. Shows a progress bar like these programs, so that its rate is measured like theirs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from _inputs import inputs_of
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from dreamlora.families import flux

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
LORA_LAYERS: dict[str, list[str] | str] = {
    "UNet2DConditionModel": ATTENTION,
    "FluxTransformer2DModel": list(flux.LORA_LAYERS),
    "Flux2Transformer2DModel": r".*\.(to_[qkv]|to_out\.0|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out",
}
"""Those of diffusers' scripts, as PEFT's target_modules."""


def frozen_denoiser(folder: Path, device: str, dtype: torch.dtype, base: str | None) -> Any:
    """The pipeline's UNet or transformer on a device; ``base`` is the form that diffusers stores its weights in: nf4 by
    bitsandbytes, fp8 by casting each layer for the time of its use; None or bf16: as they are computed with.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    part = "unet" if "unet" in index else "transformer"
    options: dict[str, Any] = {"subfolder": part, "torch_dtype": dtype}
    if base == "nf4":
        options["quantization_config"] = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
        )
    denoiser = getattr(diffusers, index[part][1]).from_pretrained(folder, **options)
    if base == "fp8":
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    return denoiser.to(device).requires_grad_(False)


def add_lora(denoiser: Any, rank: int) -> None:
    """Of PEFT, in float32, on the layers of diffusers' scripts."""
    layers = LORA_LAYERS[type(denoiser).__name__]
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers))
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def prompt_tokens(folder: Path) -> int:
    """So many a prompt has: T5's and Qwen's are padded to 512, CLIP's to its positions."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if "transformer" in index:
        return 512
    config = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])


def latent_side(folder: Path, denoiser: nn.Module, resolution: int | None) -> int:
    """Of images of a resolution; None: of those that a UNet was made for."""
    if resolution is None:
        return int(denoiser.config.sample_size)  # type: ignore[union-attr,arg-type]
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    return resolution // 2 ** (len(config["block_out_channels"]) - 1)


def main() -> None:
    """Parse the flags and make the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a pipeline of SD, SDXL, FLUX.1 or FLUX.2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--base_precision", choices=["bf16", "fp8", "nf4"])
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    mixed = options.mixed_precision == "bf16"
    dtype = torch.bfloat16 if mixed else torch.float32
    denoiser = frozen_denoiser(options.model, options.device, dtype, options.base_precision)
    add_lora(denoiser, options.rank)
    if options.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    optimizer = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=1e-3, fused=True)
    side = latent_side(options.model, denoiser, options.resolution)
    batches = [inputs_of(denoiser, options.batch, side, prompt_tokens(options.model)) for _ in range(8)]
    with tqdm(total=options.steps, desc="bare") as bar:
        for step in range(options.steps):
            inputs, target = batches[step % len(batches)]
            with torch.autocast(options.device, dtype, enabled=mixed):
                prediction = denoiser(**inputs, return_dict=False)[0]
            F.mse_loss(prediction.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            if options.device == "cuda":
                torch.cuda.synchronize()  # the programs wait too: they show every step's loss
            bar.update()


if __name__ == "__main__":
    main()
