"""A small HiDreamImagePipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tinymodels.parts import clip, clip_tokenizer, kl_vae, t5, t5_tokenizer
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 16
CLIP_LENGTH = 248
"""More than CLIP's own 77, as in the real ones."""


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after a begin; no padding token, as in the real one."""
    vocab = {token: i for i, token in enumerate(["<|begin|>", "<|end|>", *sorted(ByteLevel.alphabet())])}
    inner = Tokenizer(BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|begin|>", eos_token="<|end|>", model_max_length=256
    )


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A text encoder of three layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    )


def save(folder: Path, **more: Any) -> Path:
    """Latents have 4 channels; two pixels of a side are one of their places."""
    torch.manual_seed(0)
    tokenizers = [clip_tokenizer(CLIP_LENGTH), clip_tokenizer(CLIP_LENGTH), t5_tokenizer(), llama_tokenizer()]
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[24, 16],
        text_emb_dim=32,
        num_routed_experts=3,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 2),
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": kl_vae(
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
        "text_encoder": clip(tokenizers[0], projection=True),
        "tokenizer": tokenizers[0],
        "text_encoder_2": clip(tokenizers[1], projection=True),
        "tokenizer_2": tokenizers[1],
        "text_encoder_3": t5(tokenizers[2]),
        "tokenizer_3": tokenizers[2],
        "text_encoder_4": llama(tokenizers[3]),
        "tokenizer_4": tokenizers[3],
        "transformer": transformer,
    }
    HiDreamImagePipeline(**{**parts, **more}).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    t5_embeds, _, llama_embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    return {
        "prompt_embeds_t5": t5_embeds,
        "prompt_embeds_llama3": llama_embeds.transpose(0, 1),
        "pooled_prompt_embeds": pooled,
    }


def _read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    return Seen(arguments["hidden_states"], arguments["timesteps"] / 1000, -output[0])


def _draw_small(pipeline: Any, height: int, width: int) -> None:
    """The stock pipeline scales what it is asked for to a square of 128 latents' area, a constant."""
    pipeline.default_sample_size = math.sqrt(height * width) / pipeline.vae_scale_factor * (1 + 1e-9)


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=_read_call,
    recipe=flow,
    default_side=lambda pipeline: HiDreamImagePipeline(**pipeline.components).default_sample_size * 2,
    prepare=_draw_small,
    call={"max_sequence_length": LENGTH},
    length=LENGTH,
    prompt_limit=LENGTH,
)
