"""A small FluxPipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor

from tests.tinymodels.parts import clip, clip_tokenizer, kl_vae, t5, t5_tokenizer
from tests.tinymodels.tiny import Seen, Tiny, flow


def save(folder: Path, *, guidance_embeds: bool = True, pipeline_class: Any = FluxPipeline) -> Path:
    """Latents have 4 channels; two pixels of a side are one of their places."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def save_kontext(folder: Path) -> Path:
    """The same parts as a FluxKontextPipeline."""
    return save(folder, pipeline_class=FluxKontextPipeline)


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    embeds, pooled, _ = pipeline.encode_prompt(prompts)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    """Of a transformer over packed latents."""
    count = sides[0] * sides[1] // 4  # behind these there may be tokens of an image to edit
    noisy, prediction = (unpacked(packed[:, :count], sides) for packed in (arguments["hidden_states"], output[0]))
    return Seen(noisy, arguments["timestep"].expand(len(noisy)), prediction)


def unpacked(packed: Tensor, sides: tuple[int, int]) -> Tensor:
    """``[B, h w / 4, 4 C]`` as ``[B, C, h, w]``, written anew: a token holds (c, row, column)."""
    height, width = sides
    patches = packed.view(len(packed), height // 2, width // 2, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(packed), -1, height, width)


def _tiny(save: Callable[[Path], Path], **more: Any) -> Tiny:
    return Tiny(
        save=save,
        embeddings=_embeddings,
        read_call=read_call,
        recipe=flow,
        default_side=lambda pipeline: pipeline.default_sample_size * pipeline.vae_scale_factor,
        prompt_limit=512,
        **more,
    )


TINY = _tiny(save)
VARIANTS = {"kontext": _tiny(save_kontext)}
