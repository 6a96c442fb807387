"""A small AuraFlowPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import LlamaTokenizer, UMT5Config, UMT5EncoderModel

from tests.tinymodels.chat import outspoken
from tests.tinymodels.parts import kl_vae
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 32


def save(folder: Path) -> Path:
    """For 16 x 16 pixels (latents 4 x 8 x 8), at most 32 x 32."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=16,
        pos_embed_max_size=64,
    )
    AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=kl_vae(scaling_factor=0.13025),
        transformer=outspoken(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)
    return folder


def _tokenizer() -> LlamaTokenizer:
    """One token per letter, after a begin."""
    tokens = ["<pad>", "</s>", "<unk>", "<s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return LlamaTokenizer(vocab=vocab, merges=[], pad_token="<pad>", padding_side="right", add_bos_token=True)


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    embeds, *_ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    return {"prompt_embeds": embeds}


def _read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    return Seen(arguments["hidden_states"], arguments["timestep"], output[0])


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=_read_call,
    recipe=flow,
    default_side=lambda pipeline: pipeline.transformer.config.sample_size * pipeline.vae_scale_factor,
    prompt_limit=LENGTH,
    call={"max_sequence_length": LENGTH},
    length=LENGTH,
)
