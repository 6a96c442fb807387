"""Samples depend on the weights and their own seed alone, and drawing leaves no trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline

from dreamlora.config import Model, Sample
from dreamlora.families import flux, sd
from dreamlora.interfaces import SampleDefaults
from dreamlora.models.loading import resolve_source
from dreamlora.sampling.sampler import Guidance, SamplePlan, draw, embedding, plan_of
from dreamlora.sampling.schedulers import NOISY, deterministic

PROMPTS = ("a photo of sks dog", "a cat")


@pytest.fixture(scope="module")
def stable_diffusion(sd_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(sd_folder)


@pytest.fixture(scope="module")
def flux_pipeline(flux_folder: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(flux_folder)


def small_plan(**changes: Any) -> SamplePlan:
    return SamplePlan(**{"prompts": PROMPTS, "num_inference_steps": 2, "guidance_scale": 3.0, **changes})


def texts(prompts: list[str]) -> dict[str, Any]:
    """What is asked of a pipeline with text encoders."""
    return {"prompt": prompts, "guidance_scale": 3.0}


def pixels(pipeline: Any, plan: SamplePlan, asked: Any = texts, **options: Any) -> dict[str, np.ndarray]:
    return {drawn.item.name: np.asarray(drawn.image).astype(int) for drawn in draw(pipeline, plan, asked, **options)}


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert abs(left[name] - right[name]).max() <= 1, name


def test_seeds_count_up_over_prompts_and_images() -> None:
    items = small_plan(num_images_per_prompt=2, seed=42).items()
    assert [(item.prompt_index, item.image_index, item.seed) for item in items] == [
        (0, 0, 42),
        (0, 1, 43),
        (1, 0, 44),
        (1, 1, 45),
    ]
    assert items[2].name == "p01_s44"


@pytest.mark.parametrize("pipeline", ["stable_diffusion", "flux_pipeline"])
def test_batch_size_does_not_matter(pipeline: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(pipeline)
    one = pixels(pipe, small_plan(num_images_per_prompt=2, batch_size=1, width=16, height=16))
    four = pixels(pipe, small_plan(num_images_per_prompt=2, batch_size=4, width=16, height=16))
    assert len(one) == 4
    assert_same(one, four)
    assert abs(one["p00_s42"] - one["p00_s43"]).max() > 1, "seeds differ"


def test_processes_share_the_images(stable_diffusion: StableDiffusionPipeline) -> None:
    plan = small_plan(num_images_per_prompt=2, batch_size=2)
    shares = [pixels(stable_diffusion, plan, rank=rank, world=3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 1, 1]
    assert_same(shares[0] | shares[1] | shares[2], pixels(stable_diffusion, plan))


def test_processes_call_the_pipeline_equally_often(stable_diffusion: StableDiffusionPipeline) -> None:
    calls = [0, 0, 0]
    for rank in range(3):

        def counted(prompts: list[str], rank: int = rank) -> dict[str, Any]:
            calls[rank] += 1
            return texts(prompts)

        list(draw(stable_diffusion, small_plan(batch_size=1), counted, rank, 3))
    assert calls == [1, 1, 1], "a sharded model would wait for the missing call"


def test_drawing_leaves_no_trace(stable_diffusion: StableDiffusionPipeline) -> None:
    pipe = stable_diffusion
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.unet.requires_grad_(True)
    before_modes = [part.training for part in pipe.unet.modules()]
    before_weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    before_scheduler, before_times = pipe.scheduler, pipe.scheduler.timesteps.clone()
    torch.manual_seed(7)
    random.seed(7)
    before_state, before_python, before_numpy = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
    )
    try:
        images = draw(pipe, small_plan(batch_size=1), texts)
        next(images)
        assert torch.is_grad_enabled(), "nor between two images"
        assert pipe.unet.training
        list(images)
        assert torch.equal(torch.get_rng_state(), before_state)
        assert random.getstate() == before_python
        assert (np.random.get_state()[1] == before_numpy).all()
        assert [part.training for part in pipe.unet.modules()] == before_modes
        assert pipe.scheduler is before_scheduler
        assert torch.equal(pipe.scheduler.timesteps, before_times)
        assert all(torch.equal(value, before_weights[name]) for name, value in pipe.unet.state_dict().items())
        assert all(parameter.grad is None for parameter in pipe.unet.parameters())
        assert all(parameter.requires_grad for parameter in pipe.unet.parameters())
        assert "decode" not in vars(pipe.vae)
    finally:
        pipe.unet.requires_grad_(False).eval()


def test_everything_is_put_back_after_an_error(stable_diffusion: StableDiffusionPipeline) -> None:
    scheduler = stable_diffusion.scheduler
    stable_diffusion.unet.train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="prompt"):
        list(draw(stable_diffusion, small_plan(), lambda prompts: {"prompt": None}))
    assert stable_diffusion.unet.training
    assert stable_diffusion.scheduler is scheduler
    assert "decode" not in vars(stable_diffusion.vae)
    assert torch.equal(torch.get_rng_state(), state)
    stable_diffusion.unet.eval()


def test_a_scheduler_that_draws_globally_cannot_disturb_training(stable_diffusion: StableDiffusionPipeline) -> None:
    def drawing(prompts: list[str]) -> dict[str, Any]:
        torch.rand(3)
        return texts(prompts)

    state = torch.get_rng_state()
    list(draw(stable_diffusion, small_plan(), drawing))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("family", "folder"), [(sd, "sd_folder"), (flux, "flux_folder")])
def test_ready_embeddings_give_the_images_of_the_text(family: Any, folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    whole = {sd: StableDiffusionPipeline, flux: FluxPipeline}[family].from_pretrained(path)
    names = [name for name in whole.components if name.startswith(("text_encoder", "tokenizer"))]
    text = {name: whole.components[name] for name in names}
    rest = {name: part for name, part in whole.components.items() if name not in names}
    rest["settings"] = {"_class_name": type(whole).__name__}

    def encode(prompts: list[str], views: Any) -> Any:
        return family.encode_tokens(text, family.tokenize(text, prompts, None))

    source = resolve_source(Model(pretrained_model_name_or_path=str(path)))
    asked = embedding(Guidance(family, source, 3.0), encode)
    plan = small_plan(width=16, height=16)
    assert_same(pixels(family.pipeline(rest), plan, asked), pixels(whole, plan))


@pytest.mark.parametrize(("scale", "given", "negative"), [(3.0, None, ""), (3.0, "blue", "blue"), (1.0, "blue", None)])
def test_negative_prompts_are_encoded_where_the_pipeline_uses_them(
    scale: float, given: str | None, negative: str | None, sd_folder: Path, flux_folder: Path
) -> None:
    seen: list[str] = []

    def encode(prompts: list[str], views: Any) -> Any:
        seen.extend(prompts)
        return {"prompt_embeds": torch.zeros(len(prompts), 1, 1)}

    for family, folder, wanted in ((sd, sd_folder, negative), (flux, flux_folder, None)):
        seen.clear()
        source = resolve_source(Model(pretrained_model_name_or_path=str(folder)))
        arguments = embedding(Guidance(family, source, scale, given), encode)(["a", "b"])
        assert seen == ["a", "b"] + ([] if wanted is None else [wanted] * 2) or seen == [wanted] * 2 + ["a", "b"]
        assert ("negative_prompt_embeds" in arguments) is (wanted is not None)
        assert arguments["guidance_scale"] == scale


def test_autocast_leaves_the_autoencoder_alone(stable_diffusion: StableDiffusionPipeline) -> None:
    seen: list[torch.dtype] = []
    convolution = stable_diffusion.vae.decoder.conv_in
    handle = convolution.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(draw(stable_diffusion, small_plan(), texts))
    handle.remove()
    assert set(seen) == {torch.float32}


def test_not_finite_images_are_reported_and_do_not_stop_the_run(
    stable_diffusion: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    weight = stable_diffusion.unet.conv_out.bias
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        drawn = list(draw(stable_diffusion, small_plan(), texts))
    finally:
        weight.data.copy_(kept)
    assert [image.problem for image in drawn] == ["not finite"] * 2
    assert np.asarray(drawn[0].image).max() == 0
    assert "not finite" in caplog.text


@pytest.mark.parametrize("name", sorted(NOISY))
def test_noisy_schedulers_are_replaced(name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(diffusers, name)(beta_start=0.001, beta_end=0.02, prediction_type="v_prediction")
    copy, note = deterministic(scheduler)
    assert type(copy).__name__ == NOISY[name]
    assert (copy.config.beta_end, copy.config.prediction_type) == (0.02, "v_prediction")
    assert note is not None and name in note


def test_stochastic_settings_are_switched_off() -> None:
    copy, note = deterministic(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True))
    assert copy.config.stochastic_sampling is False and copy.config.shift == 3.0 and note
    copy, note = deterministic(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"))
    assert copy.config.algorithm_type == "dpmsolver++" and note


def test_deterministic_schedulers_are_copied(stable_diffusion: StableDiffusionPipeline) -> None:
    copy, note = deterministic(stable_diffusion.scheduler)
    assert copy is not stable_diffusion.scheduler
    assert type(copy) is type(stable_diffusion.scheduler)
    assert note is None


def test_plan_of_options() -> None:
    defaults = SampleDefaults(num_inference_steps=20, guidance_scale=3.0)
    plan = plan_of(Sample(num_inference_steps=5, num_validation_images=2), defaults, ["a dog"], 64, 8)
    assert plan == SamplePlan(("a dog",), 5, 3.0, 2, seed=42, batch_size=8, width=64, height=64)
    assert plan_of(Sample(sample_guidance_scale=0.0), defaults, ["a dog"], 64, 8).guidance_scale == 0.0


def test_a_family_can_have_a_negative_prompt_of_its_own() -> None:
    """Some pipelines do not guide without one; an empty one is one that is given."""
    defaults = SampleDefaults(num_inference_steps=20, guidance_scale=3.0, negative_prompt=" ")
    found = [
        plan_of(Sample(negative_prompt=given), defaults, ["a dog"], 64, 8).negative_prompt for given in (None, "", "x")
    ]
    assert found == [" ", "", "x"]
