"""What FLUX.1, FLUX.2 and Chroma have in common."""

from __future__ import annotations

from typing import Any

from dreamlora.errors import UserError
from dreamlora.families import _parts
from dreamlora.interfaces import Classes, ModelSource

T5_TOKENIZERS: Classes = ("transformers.T5TokenizerFast", "transformers.T5Tokenizer")
T5: Classes = ("transformers.T5EncoderModel",)
AUTOENCODERS: Classes = ("diffusers.AutoencoderKL", "diffusers.AutoencoderTiny")
LORA_LAYERS: tuple[str, ...] = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
LONGEST_PROMPT = 512
"""Tokens that the models were trained with."""


def resolution(source: ModelSource) -> int:
    """See ``Family.resolution``: the pipelines' default side is 128 latents, 1024 pixels with FLUX's autoencoders."""
    return 128 * _parts.pixels_per_latent(source)


def prompt_limit(tokenizer: Any, max_length: int | None) -> int:
    """See ``Family.prompt_limit``: tokens of T5 or of a chat, their marks included.

    Raises:
        UserError: more than 512 tokens are asked for.
    """
    length = LONGEST_PROMPT if max_length is None else max_length
    if length > LONGEST_PROMPT:
        raise UserError(f"--max_sequence_length must be at most {LONGEST_PROMPT} (got {length})")
    return length
