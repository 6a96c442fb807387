"""Pipelines as large as published models on a few kilobytes of disk: real configs, and weights that are holes in files.

What reads headers alone (``dreamlora doctor``) finds them whole; their numbers are all zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FluxTransformer2DModel, UNet2DConditionModel
from diffusers import Flux2Transformer2DModel as Flux2
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from benchmarks._unets import SD15, SDXL
from tests.models.real_configs import OPENCLIP_BIG_G, QWEN3_4B, T5_XXL
from tests.tinymodels import flux2, save_flux, save_sd
from tests.tinymodels import sdxl as tiny_sdxl
from tests.tinymodels.parts import clip_tokenizer, write_holes

_BLOCKS: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_KLEIN_4B: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


def _clip(**more: Any) -> nn.Module:
    return CLIPTextModel(CLIPTextConfig(**{**_CLIP_L, **more}))


def _config(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("architectures", "torch_dtype")}


def _vae(channels: int) -> nn.Module:
    return AutoencoderKL(**_BLOCKS, latent_channels=channels, sample_size=1024)


PARTS: dict[str, tuple[Callable[[Path], Path], dict[str, Callable[[], nn.Module]]]] = {
    "sd15": (
        save_sd,
        {"unet": lambda: UNet2DConditionModel(**SD15), "vae": lambda: _vae(4), "text_encoder": _clip},
    ),
    "sdxl": (
        tiny_sdxl.save,
        {
            "unet": lambda: UNet2DConditionModel(**SDXL),
            "vae": lambda: _vae(4),
            "text_encoder": _clip,
            "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_config(OPENCLIP_BIG_G))),
        },
    ),
    "flux": (
        save_flux,
        {
            "transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
            "vae": lambda: _vae(16),
            "text_encoder": _clip,
            "text_encoder_2": lambda: T5EncoderModel(T5Config(**_config(T5_XXL))),
        },
    ),
    "klein": (
        flux2.save,
        {
            "transformer": lambda: Flux2(**_KLEIN_4B),
            "vae": lambda: AutoencoderKLFlux2(**_BLOCKS, latent_channels=32, sample_size=1024),
            "text_encoder": lambda: Qwen3ForCausalLM(Qwen3Config(**_config(QWEN3_4B))),
        },
    ),
}
"""By name: a small pipeline of the same classes, and the parts that take the places of its own."""


def save(name: str, folder: Path) -> Path:
    """Write the pipeline; weights are bf16."""
    tiny, parts = PARTS[name]
    tiny(folder)
    for part, build in parts.items():
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        with torch.device("meta"):
            module: Any = build().bfloat16()
        if hasattr(module, "save_config"):
            module.save_config(folder / part)
            write_holes(dict(module.named_parameters()), folder / part / "diffusion_pytorch_model.safetensors")
        else:
            module.config.save_pretrained(folder / part)
            write_holes(dict(module.named_parameters()), folder / part / "model.safetensors")
    for tokenizer in folder.glob("tokenizer*"):
        if name != "klein" and (tokenizer / "vocab.json").exists():
            clip_tokenizer(77).save_pretrained(tokenizer)
    return folder


def wide(folder: Path) -> Path:
    """A FLUX of six blocks whose real weights, and what it computes with, outweigh all that is fixed."""
    save_flux(folder)
    torch.manual_seed(0)
    FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    ).save_pretrained(folder / "transformer")
    return folder
