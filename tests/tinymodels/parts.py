"""What several small models are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_LENGTH = 16
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def kl_vae(channels: int = 4, **config: Any) -> AutoencoderKL:
    """Two pixels of a side are one latent."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=16,
        **config,
    )


def clip_tokenizer(length: int = CLIP_LENGTH) -> CLIPTokenizer:
    """One token per letter, and so many of them at most."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=length)


def clip(tokenizer: CLIPTokenizer, width: int = 16, *, projection: bool = False) -> Any:
    """A text encoder of two layers, for prompts as long as the tokenizer's."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_tokenizer() -> T5TokenizerFast:
    """One token per letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in _LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def t5(tokenizer: T5TokenizerFast, width: int = 24) -> T5EncoderModel:
    """A text encoder of one layer."""
    vocabulary = len(tokenizer)
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def write_holes(tensors: Mapping[str, Tensor], file: Path) -> None:
    """A safetensors file of tensors in bf16 whose numbers take no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
