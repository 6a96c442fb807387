"""Prompts are encoded by text encoders that have the device for themselves; nothing of the model is there besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dreamlora.config import Model
from dreamlora.models.loading import family_of, resolve_source
from dreamlora.models.parts import Parts
from dreamlora.models.turns import HOST
from dreamlora.training.prompt_encoder import PromptEncoder
from tests.fakemps import MPS, Bus

PROMPTS = ["a cat", "two red dogs"]


def parts_of(folder: Any, device: torch.device = MPS, **options: Any) -> Parts:
    source = resolve_source(Model(pretrained_model_name_or_path=str(folder), **options))
    return Parts(family_of(source), source, device, torch.float32)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd", "lumina2"])
def test_what_is_prepared_needs_no_text_encoder_again(name: str, tiny_folder: Any, bus: Bus) -> None:
    parts = parts_of(tiny_folder(name))
    encode = PromptEncoder(parts, None)
    [denoiser] = (part for key, part in parts.get("denoiser").items() if key == parts.family.DENOISER)
    encode.prepare([([prompt], {}) for prompt in PROMPTS])
    assert not bus.here and bus.most == 1
    arrivals = bus.arrivals
    parts.get("denoiser")
    both = encode(PROMPTS, {})
    assert bus.here == [denoiser] and bus.arrivals == arrivals + 1
    assert all(len(value) == 2 and value.device == MPS for value in both.values())
    encode.prepare([([prompt], {}) for prompt in PROMPTS])
    assert bus.here == [denoiser]  # nothing was to be made, and nobody had to go
    parts.free("text", "denoiser")
    one_by_one = PromptEncoder(parts, None)
    again = one_by_one(PROMPTS, {})
    assert all(torch.equal(value.inner, both[name].inner) for name, value in again.items())


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_embeddings_wait_in_host_memory(name: str, tiny_folder: Any, bus: Bus) -> None:
    """Of all captions of an evaluation set they would take more of a GPU than the model."""
    parts = parts_of(tiny_folder(name))
    encode = PromptEncoder(parts, None)
    encode.prepare([([prompt], {}) for prompt in PROMPTS])
    encode(["a third"], {})
    kept = [value.device for row in encode._encoded.values() for value in row.values()]
    assert len(kept) >= 3 and set(kept) == {HOST}
    assert all(value.device == MPS for value in encode(PROMPTS, {}).values())


def test_when_the_encoders_have_changed_they_are_asked_again(tiny_folder: Any) -> None:
    parts = parts_of(tiny_folder("sd"), torch.device("cpu"))
    encode = PromptEncoder(parts, None)
    before = encode(PROMPTS[:1], {})["prompt_embeds"]
    parts.text["text_encoder"].final_layer_norm.bias.data += 1
    assert torch.equal(encode(PROMPTS[:1], {})["prompt_embeds"], before)
    encode.forget()
    assert not torch.equal(encode(PROMPTS[:1], {})["prompt_embeds"], before)


@pytest.mark.parametrize("name", ["flux", "sd"])
def test_text_encoders_on_the_cpu_leave_the_device_alone(name: str, tiny_folder: Any, bus: Bus) -> None:
    parts = parts_of(tiny_folder(name), text_encoder_device="cpu")
    encode = PromptEncoder(parts, None)
    parts.get("denoiser")
    here = list(bus.here)
    encode.prepare([([prompt], {}) for prompt in PROMPTS])
    assert bus.here == here and bus.arrivals == 1
    assert all(value.device == MPS for value in encode(PROMPTS, {}).values())
