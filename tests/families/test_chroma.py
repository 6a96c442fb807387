"""Chroma: which tokens of a prompt the transformer sees, and when it is trained."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dreamlora.config import Model, Train
from dreamlora.families import chroma
from dreamlora.interfaces import Components, Conditioning
from dreamlora.models.loading import resolve_source


@pytest.fixture(scope="module")
def parts(tiny_folder) -> Components:
    source = resolve_source(Model(pretrained_model_name_or_path=str(tiny_folder("chroma"))))
    return chroma.load(source, "text", torch.float32) | chroma.load(source, "denoiser", torch.float32)


@torch.no_grad()
def encoded(parts: Components, prompts: list[str], length: int = 20) -> Conditioning:
    return chroma.encode_tokens(parts, chroma.tokenize(parts, prompts, length))


def test_one_pad_after_a_prompt_is_seen(parts):
    """A prompt that fills its tokens has none."""
    counts = chroma.count_tokens(parts["tokenizer"], ["a cat", "", "a" * 30])
    found = encoded(parts, ["a cat", "", "a" * 30])
    assert found["prompt_attention_mask"].dtype == torch.bool
    assert found["prompt_attention_mask"].sum(dim=1).tolist() == [counts[0] + 1, counts[1] + 1, 20]
    assert encoded(parts, ["", "a cat"])["prompt_embeds"].shape[1] == counts[0] + 1


@torch.no_grad()
def test_what_the_mask_leaves_out_changes_nothing(parts):
    noisy, times = torch.randn(2, 4, 4, 6), torch.tensor([0.3, 0.8])
    told = encoded(parts, ["", "a cat on a mat"])
    seen = int(told["prompt_attention_mask"][0].sum())
    plain = chroma.predict(parts["transformer"], noisy, times, told, 1.0)
    for place, differs in ((seen, False), (seen - 1, True)):
        other = told["prompt_embeds"].clone()
        other[0, place:] += 1.0
        found = chroma.predict(parts["transformer"], noisy, times, {**told, "prompt_embeds": other}, 1.0)
        assert torch.equal(found, plain) != differs


@torch.no_grad()
def test_the_pipelines_own_masks_of_prompts_mask(parts):
    """Numbers would not (diffusers#13619); prompts go to it where text encoders are there while samples are drawn."""
    made = chroma.pipeline(parts)
    _, _, mask, *_ = made.encode_prompt(["a cat", "a"], do_classifier_free_guidance=False, max_sequence_length=20)
    expected = encoded(parts, ["a cat", "a"])
    longest = expected["prompt_embeds"].shape[1]
    assert mask.dtype == torch.bool and not mask[:, longest:].any()
    assert torch.equal(mask[:, :longest], expected["prompt_attention_mask"])


def test_times_are_drawn_by_a_parabola():
    """Its distribution function is 3 σ² - 2 σ³, whatever the size of the image."""
    objective = chroma.objective(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), Train())
    uniforms = torch.linspace(0.05, 0.95, 7)
    for sides in ((16, 16), (128, 128)):
        sigmas = objective.draw_times(uniforms[:, None].expand(-1, 2), sides)
        torch.testing.assert_close(3 * sigmas**2 - 2 * sigmas**3, 1 - uniforms, rtol=0, atol=3e-3)
