"""The step that a training program cannot be faster than: forward, backward and fused AdamW on tensors in memory.

    python benchmarks/_bare_step.py MODEL_FOLDER --steps 200 --batch 4 --rank 8

The LoRA model is that of ``train_speed.py``; nothing is read, drawn, clipped, checked, logged or saved. Shows a
progress bar like the programs it is compared with, so that its rate is measured like theirs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

LORA_LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]


def lora_unet(folder: str, rank: int) -> UNet2DConditionModel:
    """The pipeline's UNet, frozen, with LoRA on its attention layers."""
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_LAYERS))
    return unet.train()


def batch_of(unet: UNet2DConditionModel, size: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy latents, times, prompt embeddings and target, all random."""
    config, device = unet.config, unet.device
    latents = (size, config.in_channels, config.sample_size, config.sample_size)
    noisy, target = torch.randn(latents, device=device), torch.randn(latents, device=device)
    times = torch.randint(1000, (size,), device=device)
    return noisy, times, torch.randn(size, tokens, config.cross_attention_dim, device=device), target


def main() -> None:
    """Parse the flags and make the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    unet = lora_unet(options.model, options.rank).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3, fused=True)
    text_encoder = json.loads(Path(options.model, "text_encoder", "config.json").read_text(encoding="utf-8"))
    batches = [batch_of(unet, options.batch, text_encoder["max_position_embeddings"]) for _ in range(8)]
    with tqdm(total=options.steps, desc="bare") as bar:
        for step in range(options.steps):
            noisy, times, embeddings, target = batches[step % len(batches)]
            F.mse_loss(unet(noisy, times, embeddings, return_dict=False)[0], target).backward()
            optimizer.step()
            optimizer.zero_grad()
            if unet.device.type == "cuda":
                torch.cuda.synchronize()  # the programs wait too: they show every step's loss
            bar.update()


if __name__ == "__main__":
    main()
