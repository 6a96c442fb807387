"""A small StableDiffusion3Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from tests.tinymodels.parts import clip, clip_tokenizer, kl_vae, t5, t5_tokenizer
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 24


def save(folder: Path, *, with_t5: bool = True, **config: Any) -> Path:
    """The first block has two attentions, as in 3.5 medium; the last one drops the prompt, as in all."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    tokenizer_2.pad_token = "!"  # as in the real ones
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 40,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
            **config,
        }
    )
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer_2, projection=True),
        tokenizer_2=tokenizer_2,
        text_encoder_3=t5(tokenizer_3, 40) if with_t5 else None,
        tokenizer_3=tokenizer_3 if with_t5 else None,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    return Seen(arguments["hidden_states"], arguments["timestep"] / 1000, output[0])


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=read_call,
    recipe=flow,
    default_side=lambda pipeline: pipeline.default_sample_size * pipeline.vae_scale_factor,
    call={"max_sequence_length": LENGTH},
    length=LENGTH,
    prompt_limit=LENGTH,
)
