"""A small StableDiffusionPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from tests.tinymodels.parts import CLIP_LENGTH, clip, clip_tokenizer, kl_vae
from tests.tinymodels.tiny import Tiny, diffusion, plain_call


def save(
    folder: Path,
    *,
    unet: UNet2DConditionModel | None = None,
    prediction_type: str = "epsilon",
    **scheduler: Any,
) -> Path:
    """A StableDiffusionPipeline for 16 x 16 pixels (latents 4 x 8 x 8); with another UNet, twice its sample_size."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = unet or UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        **scheduler,
    )
    StableDiffusionPipeline(
        vae=kl_vae(scaling_factor=0.18215),
        text_encoder=clip(tokenizer, unet.config.cross_attention_dim),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    return {"prompt_embeds": pipeline.encode_prompt(prompts, "cpu", 1, False)[0]}


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=plain_call,
    recipe=diffusion,
    default_side=lambda pipeline: pipeline.unet.config.sample_size * pipeline.vae_scale_factor,
    prompt_limit=CLIP_LENGTH,
)
