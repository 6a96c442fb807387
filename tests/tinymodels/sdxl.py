"""A small StableDiffusionXLPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from tests.tinymodels.parts import CLIP_LENGTH, clip, clip_tokenizer, kl_vae
from tests.tinymodels.tiny import Tiny, diffusion, plain_call


def save(folder: Path, *, force_zeros_for_empty_prompt: bool = True, **scheduler: Any) -> Path:
    """For 16 x 16 pixels (latents 4 x 8 x 8)."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer()
    tokenizer_2.pad_token = "!"  # as in the real ones
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        use_linear_projection=True,
    )
    StableDiffusionXLPipeline(
        vae=kl_vae(scaling_factor=0.13025),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer_2, projection=True),
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
            **scheduler,
        ),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=plain_call,
    recipe=diffusion,
    default_side=lambda pipeline: pipeline.default_sample_size * pipeline.vae_scale_factor,
    prompt_limit=CLIP_LENGTH,
)
