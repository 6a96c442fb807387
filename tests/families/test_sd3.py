"""What Stable Diffusion 3 alone has: a T5 that may be missing, two kinds of attention, models of two generations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from dreamlora.config import Lora, Model, Train
from dreamlora.errors import UserError
from dreamlora.families import sd3
from dreamlora.interfaces import Components, ModelSource
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.models import loading, prompts
from tests.tinymodels.parts import CLIP_LENGTH, clip_tokenizer
from tests.tinymodels.sd3 import save

PROMPTS = ["a cat", "two red dogs"]


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


def all_parts(source: ModelSource) -> Components:
    parts: Components = {}
    for role in sd3.PARTS:
        parts |= sd3.load(source, role, torch.float32)
    return parts


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory) -> ModelSource:
    return source_of(save(tmp_path_factory.mktemp("models") / "without", with_t5=False))


def drawn(pipeline: Any, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    return pipeline(generator=generator, **options, **arguments).images


@torch.no_grad()
@pytest.mark.parametrize("length", [None, 20])
def test_without_t5_there_are_zeros_as_in_the_stock_pipeline(without_t5, length):
    parts = all_parts(without_t5)
    stock = DiffusionPipeline.from_pretrained(without_t5.path, text_encoder_3=None, tokenizer_3=None)
    conditioning, negative = (
        sd3.encode_tokens(parts, sd3.tokenize(parts, texts, length)) for texts in (PROMPTS, ["", ""])
    )
    assert conditioning["prompt_embeds"].shape == (2, CLIP_LENGTH + (length or 256), 40)
    assert not conditioning["prompt_embeds"][:, CLIP_LENGTH:].any()
    found = drawn(sd3.pipeline(parts), **sd3.call_arguments(conditioning, negative))
    expected = drawn(stock, prompt=PROMPTS, **({"max_sequence_length": length} if length else {}))
    torch.testing.assert_close(found, expected)


def test_without_t5_a_prompt_is_what_clip_reads(without_t5):
    fits = "a" * (CLIP_LENGTH - 2)
    limit, cut = prompts.cut_prompts(sd3, without_t5, [fits, fits + "a"], None)
    assert limit == CLIP_LENGTH
    assert list(cut) == [False, True]


def test_without_t5_a_prompt_longer_than_the_pipeline_takes_is_refused_all_the_same():
    with pytest.raises(UserError, match=r"--max_sequence_length must be at most 512 \(got 513\)"):
        sd3.prompt_limit(clip_tokenizer(), 513)


def test_lora_is_on_all_attention_and_nothing_else(tmp_path):
    source = source_of(save(tmp_path / "medium"))
    denoiser = sd3.load(source, "denoiser", torch.float32)["transformer"]
    add_lora(denoiser, Lora(rank=2), sd3.LORA_LAYERS)
    layers = {name.partition(".lora_")[0] for name in trainable_parameters(denoiser)}
    image = {f"{kind}.to_{end}" for kind in ("attn", "attn2") for end in ("q", "k", "v", "out.0")}
    prompt = {f"attn.add_{end}_proj" for end in "qkv"}
    first = {f"transformer_blocks.0.{name}" for name in image | prompt | {"attn.to_add_out"}}
    last = {f"transformer_blocks.1.{name}" for name in image | prompt if not name.startswith("attn2")}
    assert layers == first | last


def test_the_first_generation_has_one_attention_and_other_guidance(tmp_path):
    folder = save(tmp_path / "sd3", qk_norm=None, dual_attention_layers=())
    source = source_of(folder)
    add_lora(sd3.load(source, "denoiser", torch.float32)["transformer"], Lora(), sd3.LORA_LAYERS)
    assert sd3.sample_defaults(source).guidance_scale == 7.0
    assert sd3.distilled(source) is None


def test_the_second_generation_is_known_by_its_normed_attention_and_turbo_by_its_name(tmp_path):
    newer, turbo = source_of(save(tmp_path / "sd3.5")), source_of(save(tmp_path / "sd3.5-large-turbo"))
    assert (sd3.sample_defaults(newer).guidance_scale, sd3.distilled(newer)) == (4.5, None)
    assert "train Stable Diffusion 3.5 large" in (sd3.distilled(turbo) or "")
    defaults = sd3.sample_defaults(turbo)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (4, 0.0)


def test_times_are_logit_normal_and_shifted_and_the_loss_weighs_them_alike(without_t5):
    scheduler = sd3.load(without_t5, "scheduler", None)["scheduler"]
    uniforms = torch.tensor([[0.25, 0.5], [0.5, 0.5], [0.75, 0.5]])
    times = sd3.objective(scheduler, Train()).draw_times(uniforms, (8, 8))
    sigma = torch.sigmoid(torch.tensor([0.6745, 0.0, -0.6745]))  # the quartiles of a normal; sigmas fall
    torch.testing.assert_close(times, 3 * sigma / (1 + 2 * sigma), rtol=0, atol=2e-3)
    assert torch.equal(sd3.objective(scheduler, Train()).weight(times), torch.ones(3))
    torch.testing.assert_close(sd3.objective(scheduler, Train(precondition_outputs=1)).weight(times), times**2)


@pytest.mark.parametrize("sides", [(34, 16), (16, 34)])
def test_images_without_positions_are_refused(tmp_path, sides):
    denoiser = sd3.load(ModelSource(str(save(tmp_path)), "tiny"), "denoiser", torch.float32)["transformer"]
    noisy = torch.zeros(1, denoiser.config.in_channels, *sides)
    with pytest.raises(UserError, match=f"at most 32 x 32 latents .got {sides[0]} x {sides[1]}"):
        sd3.predict(denoiser, noisy, torch.ones(1), {}, 0.0)
