"""Prompts, and the pictures that text encoders of some models that edit see with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dreamlora.data.cache import KeyPart, content_key
from dreamlora.interfaces import PICTURE, Components, Conditioning, Family


class ShownPrompt(NamedTuple):
    """A prompt, and the picture ``[3, h, w]`` (uint8, on the CPU) that the text encoder sees with it."""

    text: str
    picture: Tensor


Prompt: TypeAlias = str | ShownPrompt


def with_pictures(texts: Sequence[str], views: Conditioning) -> list[Prompt]:
    """Prompts with the pictures among what belongs to their images; as they are, if there are none."""
    pictures = views.get(PICTURE)
    if pictures is None:
        return list(texts)
    return [ShownPrompt(*each) for each in zip(texts, pictures.cpu(), strict=True)]


def text_of(prompt: Prompt) -> str:
    """Its words."""
    return prompt.text if isinstance(prompt, ShownPrompt) else prompt


def prompt_key(prompt: Prompt, key_parts: Mapping[str, KeyPart]) -> str:
    """Of its embeddings in the cache."""
    if isinstance(prompt, ShownPrompt):
        picture = prompt.picture.contiguous().numpy()
        digest = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()
        return content_key("prompt", prompt.text, digest, key_parts)
    return content_key("prompt", prompt, key_parts)


def tokenized(family: Family, text: Components, prompts: Sequence[Prompt], max_length: int | None) -> Conditioning:
    """What ``Family.encode_tokens`` takes of prompts, with pictures of one size or without."""
    tokens = family.tokenize(text, [text_of(prompt) for prompt in prompts], max_length)
    pictures = [prompt.picture for prompt in prompts if isinstance(prompt, ShownPrompt)]
    return {**tokens, PICTURE: torch.stack(pictures)} if pictures else tokens
