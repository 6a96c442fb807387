"""Models of the size of real ones with random weights, made on the device that they run on: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from dreamlora import tiny

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
"""Stable Diffusion 1.5, 860 M parameters: what diffusers' UNet is unless it is told otherwise, but for the text."""

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""SDXL's base model, 2,567 M parameters."""


def config_of(model: str) -> dict[str, Any]:
    """What makes the UNet of "sd15", "sdxl" or "tiny", the embedded model."""
    if model == "tiny":
        return dict(UNet2DConditionModel.load_config(tiny.pipeline_path(), subfolder="unet"))
    return {"sd15": SD15, "sdxl": SDXL}[model]


def random_unet(
    config: dict[str, Any], device: torch.device | str, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """See ``random_model``."""
    return random_model(UNet2DConditionModel, config, device, dtype)


def random_model(kind: Any, config: dict[str, Any], device: torch.device | str, dtype: torch.dtype) -> Any:
    """A frozen model of a class of diffusers; its weights are drawn on the device and in its precision, so never more
    than these are there.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            return kind.from_config(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
