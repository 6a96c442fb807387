"""A small Krea2Pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.tinymodels.qwen_image import (
    LENGTH,
    decoded,
    moments,
    qwen_tokenizer,
    qwen_vae,
    read_call,
    round_trip,
)
from tests.tinymodels.tiny import Tiny, flow


def save(folder: Path, *, is_distilled: bool = False) -> Path:
    """Latents have 4 channels; two pixels of a side are one of their places."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text_encoder = Qwen3VLModel(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        )
    )
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=qwen_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(0, 1, 3),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """The pipeline's own have padding before the template's end."""
    states, masks = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)
    rows = [row[mask] for row, mask in zip(states, masks, strict=True)]
    return {
        "prompt_embeds": pad_sequence(rows, batch_first=True),
        "prompt_embeds_mask": pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True),
    }


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=read_call,
    recipe=flow,
    default_side=lambda pipeline: 1024,
    moments=moments,
    decoded=decoded,
    round_trip=round_trip,
    prompt_limit=LENGTH,
    call={"max_sequence_length": LENGTH},
    length=LENGTH,
)
