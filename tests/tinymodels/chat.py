"""Small language models that serve as text encoders, with their tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AddedToken, Gemma2Config, Gemma2Model, GemmaTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3Model

TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
"""Qwen3's, without tools and answers."""
_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, and one for every mark of a turn."""
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=131072)  # more than the encoder's positions
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in _MARKS], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen3(tokenizer: Qwen2Tokenizer, layers: int = 3, model: Any = Qwen3Model) -> Any:
    """A text encoder of 16 channels; ``model`` may also be one with a head."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return outspoken(model(config))


def gemma_tokenizer() -> GemmaTokenizer:
    """One token per letter, after a begin."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], add_bos_token=True)


def gemma2(tokenizer: GemmaTokenizer, layers: int = 3) -> Gemma2Model:
    """A text encoder of local and global layers in turn, and 16 channels."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=layers,
        num_key_value_heads=1,
        sliding_window=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return outspoken(Gemma2Model(config))


@torch.no_grad()
def outspoken(module: Any) -> Any:
    """The module with matrices of another scale than 0.02, with which small layers would say next to nothing."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module
