"""Prompts to embeddings, by a model's text encoders as they are now: first all that are needed, then the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from dreamlora.data.shown_prompts import Prompt, prompt_key, tokenized, with_pictures
from dreamlora.interfaces import Conditioning
from dreamlora.models.parts import Parts
from dreamlora.models.turns import HOST
from dreamlora.training.stream import stack_conditioning


class PromptEncoder:
    """Batched conditioning of captions, and what belongs to their images; each prompt is encoded by itself, once.

    Args:
        parts: the model.
        length: tokens that a prompt is cut to; None: the family's own.
        training: in which encoders that train have computed; None: none has trained.
    """

    def __init__(
        self, parts: Parts, length: int | None, training: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> None:
        self._parts = parts
        self._length = length
        self._training = training
        self._encoded: dict[str, Conditioning] = {}

    def __call__(self, captions: Sequence[str], views: Conditioning) -> Conditioning:
        """On the denoiser's device."""
        rows = [self._row(prompt) for prompt in with_pictures(captions, views)]
        stacked = stack_conditioning(rows, self._parts.family.LENGTH_AXES)
        return {name: value.to(self._parts.device) for name, value in stacked.items()}

    def prepare(self, asked: Iterable[tuple[Sequence[str], Conditioning]]) -> None:
        """Encode all that will be asked for, while nothing else of the model is on the device of the text encoders.

        Nothing of the model is on it afterwards: ``Parts.get`` and ``Parts.drawer`` bring the other parts back.

        Args:
            asked: arguments of the calls.
        """
        prompts = {prompt_key(prompt, {}): prompt for each in asked for prompt in with_pictures(*each)}
        missing = {key: prompt for key, prompt in prompts.items() if key not in self._encoded}
        if missing:
            with self._parts.text_alone():
                rows = self._parts.in_turns(self._encode, list(missing.values()))
            self._encoded.update(zip(missing, rows, strict=True))

    def forget(self) -> None:
        """The text encoders have changed."""
        self._encoded.clear()

    def _row(self, prompt: Prompt) -> Conditioning:
        key = prompt_key(prompt, {})
        if key not in self._encoded:
            self._encoded[key] = self._encode(prompt)
        return self._encoded[key]

    @torch.no_grad()
    def _encode(self, prompt: Prompt) -> Conditioning:
        """A text encoder that trains is a part of what runs under autocast; one that does not has run before."""
        text = self._parts.get("text")
        family, device = self._parts.family, self._parts.device
        tokens = tokenized(family, text, [prompt], self._length)
        with torch.autocast(device.type, enabled=False):
            if self._training is None:
                encoded = family.encode_tokens(text, tokens)
            else:
                encoded = family.encode_frozen(text, tokens)
        if self._training is not None:
            encoded = {name: value.to(device) for name, value in encoded.items()}
            with self._training():
                encoded = family.encode_tokens(text, encoded)
        return {name: value.to(HOST) for name, value in encoded.items()}  # up to 70 MB, and there may be hundreds
