"""A small ChromaPipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.tinymodels.flux import read_call
from tests.tinymodels.parts import kl_vae, t5, t5_tokenizer
from tests.tinymodels.tiny import Tiny, flow


def save(folder: Path) -> Path:
    """Latents have 4 channels; two pixels of a side are one of their places."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=t5(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Without what the mask leaves out at the end of all, zeros where it leaves out something of some."""
    embeds, _, mask, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    longest = int(mask.sum(dim=1).max())
    return {
        "prompt_embeds": (embeds * mask[:, :, None])[:, :longest],
        "prompt_attention_mask": mask[:, :longest],
    }


def _mended(pipeline: Any) -> Any:
    """Its masks of prompts are numbers, which attention adds (diffusers#13619); where embeddings are given, it takes
    theirs as they are.
    """
    encode = pipeline._get_t5_prompt_embeds

    def masked(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        embeds, mask = encode(*args, **kwargs)
        return embeds, mask.bool()

    pipeline._get_t5_prompt_embeds = masked
    return pipeline


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=read_call,
    recipe=flow,
    default_side=lambda pipeline: pipeline.default_sample_size * pipeline.vae_scale_factor,
    prompt_limit=512,
    mended=_mended,
)
