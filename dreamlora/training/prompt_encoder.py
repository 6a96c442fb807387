"""Prompts to embeddings, by a model's text encoders as they are now: first all that are needed, then the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from dreamlora.data.shown_prompts import Prompt, prompt_key, tokenized, with_pictures
from dreamlora.interfaces import Components, Conditioning
from dreamlora.models.parts import Parts
from dreamlora.training.stream import stack_conditioning


def _nothing() -> None:
    """There is room."""


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
        self._make_room: Callable[[], object] = _nothing

    def __call__(self, captions: Sequence[str], views: Conditioning) -> Conditioning:
        """On the denoiser's device."""
        rows = [self._row(prompt) for prompt in with_pictures(captions, views)]
        return stack_conditioning(rows, self._parts.family.LENGTH_AXES)

    def prepare(self, ask: Callable[[Any], object], inputs: Sequence[Any]) -> None:
        """Encode all that will be asked for, while nothing else of the model is on the device of the text encoders.

        What is on it afterwards is nobody's: ``Parts.get`` and ``Parts.pipeline`` bring the other parts back.

        Args:
            ask: calls this encoder.
            inputs: of ``ask``.
        """
        with ExitStack() as stack:
            self._make_room = lambda: stack.enter_context(self._parts.text_alone())
            stack.callback(setattr, self, "_make_room", _nothing)
            self._parts.in_turns(ask, inputs)

    def forget(self) -> None:
        """The text encoders have changed."""
        self._encoded.clear()

    def _row(self, prompt: Prompt) -> Conditioning:
        key = prompt_key(prompt, {})
        if key not in self._encoded:
            self._encoded[key] = self._encode(self._text(), prompt)
        return self._encoded[key]

    def _text(self) -> Components:
        self._make_room()
        self._make_room = _nothing
        return self._parts.get("text")

    @torch.no_grad()
    def _encode(self, text: Components, prompt: Prompt) -> Conditioning:
        """A text encoder that trains is a part of what runs under autocast; one that does not has run before."""
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
        return {name: value.to(device) for name, value in encoded.items()}
