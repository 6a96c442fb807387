"""Small Flux2KleinPipelines, and a Flux2Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as Letters
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast, Qwen3ForCausalLM

from tests.tinymodels.chat import outspoken, qwen3, qwen_tokenizer
from tests.tinymodels.tiny import Seen, Tiny, flow

MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set system_message = messages[0]['content'] %}
    {%- else %}
        {%- set system_message = messages[0]['content'][0]['text'] %}
    {%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- endif %}
{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {{- '[INST]' }}
    {%- for block in message['content'] %}
        {%- if block['type'] == 'text' %}
            {{- block['text'] }}
        {%- endif %}
    {%- endfor %}
    {{- '[/INST]' }}
{%- endfor %}
"""
"""Mistral Small 3's, without default message, images and answers."""
_MARKS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]")


def save(folder: Path, *, is_distilled: bool = False) -> Path:
    """A [klein]. Latents have 16 channels; four pixels of a side are one of their places."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    Flux2KleinPipeline(
        scheduler=_scheduler(),
        vae=_vae(),
        text_encoder=qwen3(tokenizer, layers=28, model=Qwen3ForCausalLM),
        tokenizer=tokenizer,
        transformer=_transformer(guidance_embeds=False),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


def save_dev(folder: Path) -> Path:
    """A [dev], with a tokenizer where the real one has a processor, which only torchvision could build."""
    torch.manual_seed(0)
    tokenizer = mistral_tokenizer()
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 31,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    Flux2Pipeline(
        scheduler=_scheduler(),
        vae=_vae(),
        text_encoder=outspoken(Mistral3ForConditionalGeneration(config)),
        tokenizer=tokenizer,
        transformer=_transformer(guidance_embeds=True),
    ).save_pretrained(folder)
    return folder


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for every mark; it begins texts itself, and pads before them."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *_MARKS, *ByteLevel.alphabet()])}
    inner = Tokenizer(BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), Letters()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in ("<s>", "</s>", "<pad>", *_MARKS)])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def _transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def _embeddings(length: int) -> Any:
    return lambda pipeline, prompts: {"prompt_embeds": pipeline.encode_prompt(prompts, max_sequence_length=length)[0]}


def _read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    count = sides[0] * sides[1]  # behind these there may be tokens of an image to edit
    tokens, ids = (arguments["hidden_states"], output[0]), arguments["img_ids"][:, :count]
    noisy, prediction = (Flux2Pipeline._unpack_latents_with_ids(one[:, :count], ids) for one in tokens)
    return Seen(noisy, arguments["timestep"].expand(len(noisy)), prediction)


def _patches(vae: Any, latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` as ``[B, 4 C, h / 2, w / 2]``, normalised; written anew: a patch holds (c, row, column)."""
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    mean, variance = vae.bn.running_mean.view(-1, 1, 1), vae.bn.running_var.view(-1, 1, 1)
    return (patches - mean) * (variance + vae.config.batch_norm_eps) ** -0.5


def _moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = _patches(vae, vae.encode(pixels).latent_dist.mean)
    return mean, torch.zeros_like(mean)


def _decoded(pipeline: Any, vae: Any, latents: Tensor) -> Tensor:
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    patches = latents * std + vae.bn.running_mean.view(1, -1, 1, 1)
    return vae.decode(pipeline._unpatchify_latents(patches)).sample


def _tiny(save: Any, length: int) -> Tiny:
    """Of prompts of ``length`` tokens: short ones would be nearly all padding."""
    return Tiny(
        save=save,
        embeddings=_embeddings(length),
        read_call=_read_call,
        recipe=flow,
        default_side=lambda pipeline: pipeline.default_sample_size * pipeline.vae_scale_factor,
        prompt_limit=length,
        moments=_moments,
        decoded=_decoded,
        call={"max_sequence_length": length},
        length=length,
        latents=(16, 4, 4),
    )


TINY = _tiny(save, 64)
VARIANTS = {"dev": _tiny(save_dev, 256)}
