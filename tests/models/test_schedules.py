"""What a run says of its model's schedule, instead of the scheduler's config."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from dreamlora.config import Train
from dreamlora.errors import UserError
from dreamlora.families import _unet, sd
from dreamlora.interfaces import ModelSource
from dreamlora.models.schedules import as_trained
from dreamlora.sampling.schedulers import deterministic

V_ZERO = ModelSource("m", "m", prediction_type="v_prediction", rescale_betas_zero_snr=True)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NAMES = [
    name
    for name in (full.removeprefix("diffusers.") for full in _unet.SCHEDULERS)
    if not isinstance(getattr(diffusers, name), diffusers.utils.DummyObject)
]


@pytest.fixture(params=NAMES)
def scheduler(request: pytest.FixtureRequest):
    """As its config is read: what the config does not say is a default."""
    return getattr(diffusers, request.param).from_config(BETAS)


def rescaled() -> np.ndarray:
    """ᾱ by algorithm 1 of arXiv 2305.08891."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


def test_a_run_s_prediction_type_outlives_the_copies_that_samples_are_drawn_with(scheduler) -> None:
    found = as_trained(scheduler, ModelSource("m", "m", prediction_type="v_prediction"))
    assert type(found) is type(scheduler)
    assert found.config.prediction_type == deterministic(found)[0].config.prediction_type == "v_prediction"
    assert as_trained(scheduler, ModelSource("m", "m")) is scheduler


def test_samples_begin_at_pure_noise(scheduler) -> None:
    """Whatever sampler the pipeline comes with, drawn with a single step its first time is the last of training."""
    sampler, _ = deterministic(as_trained(scheduler, V_ZERO))
    assert sampler.config.prediction_type == "v_prediction"
    sampler.set_timesteps(10)
    assert sampler.timesteps[0] == 999, "trailing"
    np.testing.assert_allclose(sampler.alphas_cumprod[:-1], rescaled()[:-1], rtol=1e-3)
    assert sampler.alphas_cumprod[-1] < 1e-6, "some schedulers keep it off zero, which they divide by"


def test_training_has_the_schedule_of_the_paper(scheduler) -> None:
    train = Train(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for own in (scheduler, as_trained(scheduler, V_ZERO)):
        found = sd.objective(own, train).alphas_cumprod
        np.testing.assert_allclose(found, rescaled(), rtol=1e-3, atol=1e-9)
    assert sd.objective(scheduler, Train()).alphas_cumprod[-1] > 0.004, "only if it is asked for"


def test_a_sampler_that_cannot_be_rescaled_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    from dreamlora.reading import tell_once

    tell_once.cache_clear()
    for _ in range(2):
        as_trained(diffusers.PNDMScheduler.from_config(BETAS), V_ZERO)
    assert caplog.text.count("samples are drawn with EulerDiscreteScheduler: PNDMScheduler knows no zero") == 1


def test_pure_noise_is_denoised_to_the_image_that_v_names() -> None:
    """v of a known image at every step: the sampler must come out at that image."""
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler = as_trained(diffusers.DDIMScheduler.from_config({**BETAS, "clip_sample": False}), V_ZERO)
    objective = sd.objective(sampler, Train(rescale_betas_zero_snr=True))
    sampler.set_timesteps(10)
    x = noise
    for t in sampler.timesteps:
        alpha = objective.alphas_cumprod[t]
        own_noise = (x - alpha.sqrt() * image) / (1 - alpha).sqrt()
        x = sampler.step(objective.target(image, own_noise, t[None]), t, x).prev_sample
    torch.testing.assert_close(x, image, rtol=0, atol=1e-3)


def test_epsilon_cannot_have_it() -> None:
    own = diffusers.DDIMScheduler.from_config(BETAS)
    with pytest.raises(UserError, match=r"--rescale_betas_zero_snr is for models that predict v"):
        sd.objective(own, Train(rescale_betas_zero_snr=True))


def test_losses_and_images_are_not_taken_for_those_of_the_model_s_own_schedule() -> None:
    assert V_ZERO.predictor_id == "m with v_prediction and zero terminal SNR"
    assert ModelSource("m", "m", rescale_betas_zero_snr=True).predictor_id == "m with zero terminal SNR"
    assert ModelSource("m", "m").predictor_id == "m"
