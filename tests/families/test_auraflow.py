"""What AuraFlow has of its own: padding that is zero and seen, positions that end somewhere."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dreamlora.config import Model, Train
from dreamlora.errors import UserError
from dreamlora.families import auraflow
from dreamlora.interfaces import ModelSource
from dreamlora.models import loading


@pytest.fixture(scope="module")
def source(tiny_folder) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(tiny_folder("auraflow"))))


@torch.no_grad()
def test_padding_is_zero_and_counts(source):
    text = auraflow.load(source, "text", torch.float32)
    embeds = auraflow.encode_tokens(text, auraflow.tokenize(text, ["a cat"], 20))["prompt_embeds"]
    used = auraflow.count_tokens(text["tokenizer"], ["a cat"])[0]
    assert embeds.shape == (1, 20, 16) and used < 20
    assert embeds[:, :used].abs().sum(-1).all() and not embeds[:, used:].any()
    denoiser = auraflow.load(source, "denoiser", torch.float32)["transformer"]
    noisy, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    whole, cut = (
        auraflow.predict(denoiser, noisy, times, {"prompt_embeds": some}, 1.0) for some in (embeds, embeds[:, :used])
    )
    assert (whole - cut).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("sides", [(16, 18), (18, 8), (7, 8)])
def test_images_without_positions_are_refused(source, sides):
    """The stock pipeline gives them positions of other places."""
    denoiser = auraflow.load(source, "denoiser", torch.float32)["transformer"]
    conditioning, times = {"prompt_embeds": torch.zeros(1, 8, 16)}, torch.tensor([0.5])
    assert auraflow.predict(denoiser, torch.zeros(1, 4, 16, 16), times, conditioning, 1.0).isfinite().all()
    with pytest.raises(UserError, match="multiples of 16 and at most 128 pixels"):
        auraflow.predict(denoiser, torch.zeros(1, 4, *sides), times, conditioning, 1.0)


def test_longer_prompts_are_refused(source):
    tokenizer = auraflow.load(source, "text", torch.float32)["tokenizer"]
    with pytest.raises(UserError, match="--max_sequence_length must be at most 256 "):
        auraflow.prompt_limit(tokenizer, 257)


def test_the_shift_of_training_is_the_samplers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    middle = auraflow.objective(scheduler, Train()).draw_times(torch.tensor([[0.5, 0.5]]), (8, 8))
    torch.testing.assert_close(middle, torch.tensor([1.73 / 2.73]), rtol=0, atol=1e-3)
