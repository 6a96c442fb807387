"""Objectives against diffusers' schedulers and training utilities, and against formulas written down independently."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from dreamlora.errors import UserError
from dreamlora.objectives import Diffusion, RectifiedFlow, squared_errors

PREDICTIONS = ["epsilon", "v_prediction"]
SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


def ddpm(**config) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)


def sigmas(**config) -> torch.Tensor:
    return FlowMatchEulerDiscreteScheduler(**config).sigmas


@pytest.fixture
def batch() -> SimpleNamespace:
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 5, 4, 3, 6, generator=draw)
    return SimpleNamespace(latents=latents, noise=noise, times=torch.tensor([0, 1, 250, 700, 999]))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_diffusion_equals_the_scheduler(batch, prediction):
    scheduler = ddpm()
    objective = Diffusion(scheduler.alphas_cumprod, prediction)
    expected = (
        batch.noise if prediction == "epsilon" else scheduler.get_velocity(batch.latents, batch.noise, batch.times)
    )
    noisy = objective.corrupt(batch.latents, batch.noise, batch.times)
    torch.testing.assert_close(noisy, scheduler.add_noise(batch.latents, batch.noise, batch.times), rtol=0, atol=0)
    torch.testing.assert_close(objective.target(batch.latents, batch.noise, batch.times), expected, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_image_is_recovered_from_noisy_and_target(batch, prediction):
    alphas = ddpm().alphas_cumprod.double()
    objective = Diffusion(alphas, prediction)
    latents, noise = batch.latents.double(), batch.noise.double()
    noisy, target = (f(latents, noise, batch.times) for f in (objective.corrupt, objective.target))
    a = alphas[batch.times].reshape(-1, 1, 1, 1)
    found = (
        (noisy - (1 - a).sqrt() * target) / a.sqrt()
        if prediction == "epsilon"
        else noisy * a.sqrt() - target * (1 - a).sqrt()
    )
    torch.testing.assert_close(found, latents)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction, gamma):
    scheduler = ddpm()
    times = torch.arange(0, 1000, 7)
    snr = compute_snr(scheduler, times)
    expected = snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    found = Diffusion(scheduler.alphas_cumprod, prediction, gamma).weight(times)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert 0 < (found == 1).sum() < len(times) or prediction == "v_prediction"


def test_min_snr_weighs_the_image_error_alike_for_both_targets():
    """Section 3.4 of the paper: the weight of |x - x̂|² is min(SNR, γ) whatever is predicted."""
    alphas = ddpm().alphas_cumprod.double()
    times = torch.arange(0, 1000, 13)
    a = alphas[times]
    per_image_error = {"epsilon": a / (1 - a), "v_prediction": 1 / (1 - a)}  # |ε - ε̂|² and |v - v̂|² over |x - x̂|²
    for prediction, factor in per_image_error.items():
        weight = Diffusion(alphas, prediction, 5.0).weight(times)
        torch.testing.assert_close(weight * factor, (a / (1 - a)).clamp(max=5.0))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_zero_terminal_snr_is_finite(batch, prediction):
    alphas = ddpm(rescale_betas_zero_snr=True).alphas_cumprod
    assert alphas[-1] == 0
    objective = Diffusion(alphas, prediction, 5.0)
    weight = objective.weight(batch.times)
    assert weight.isfinite().all()
    assert weight[-1] == (1 if prediction == "epsilon" else 0)
    assert torch.equal(objective.corrupt(batch.latents, batch.noise, batch.times)[-1], batch.noise[-1])


def test_no_gamma_weighs_alike():
    assert Diffusion(ddpm().alphas_cumprod).weight(torch.tensor([3, 500])).tolist() == [1, 1]


def test_diffusion_times_are_uniform_indices():
    objective = Diffusion(ddpm().alphas_cumprod)
    uniforms = torch.stack([(torch.arange(4000) + 0.5) / 4000, torch.zeros(4000)], 1)
    times = objective.draw_times(uniforms, (8, 8))
    assert times.dtype == torch.int64
    assert torch.bincount(times, minlength=1000).tolist() == [4] * 1000
    assert objective.spread_times(torch.tensor([0.0005, 0.5, 0.9999])).tolist() == [0, 500, 999]
    assert objective.draw_times(torch.tensor([[1 - 2**-24, 0], [1.0, 0], [0.0, 0]]), (8, 8)).tolist() == [999, 999, 0]


def test_unknown_prediction_type():
    with pytest.raises(UserError, match=r"'sample'.*epsilon, v_prediction"):
        Diffusion(ddpm().alphas_cumprod, "sample")


def test_flow_goes_straight_from_image_to_noise(batch):
    objective = RectifiedFlow(sigmas())
    times = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    noisy, velocity = (f(batch.latents, batch.noise, times) for f in (objective.corrupt, objective.target))
    s = times.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - s * velocity, batch.latents)
    torch.testing.assert_close(noisy + (1 - s) * velocity, batch.noise)
    assert torch.equal(velocity, batch.noise - batch.latents)


def test_flow_corrupts_as_the_scheduler(batch):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    index = torch.tensor([0, 100, 500, 900, 999])
    noisy = RectifiedFlow(scheduler.sigmas).corrupt(batch.latents, batch.noise, scheduler.sigmas[index])
    torch.testing.assert_close(noisy, scheduler.scale_noise(batch.latents, scheduler.timesteps[index], batch.noise))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flow_weights_equal_diffusers(scheme):
    times = sigmas(shift=3.0)[::9]
    found = RectifiedFlow(sigmas(), scheme).weight(times)
    torch.testing.assert_close(found, compute_loss_weighting_for_sd3(scheme, times))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_density_equals_diffusers(scheme, shift):
    """Quantiles of the times of 40,000 uniforms in order against 40,000 random draws of diffusers' function."""
    count, table = 40_000, sigmas(shift=shift)
    settings = {"logit_mean": 0.6, "logit_std": 0.7, "mode_scale": 1.2}
    objective = RectifiedFlow(table, scheme, **settings)
    ranks = (torch.arange(count) + 0.5) / count
    found = objective.draw_times(torch.stack([ranks, torch.zeros(count)], 1), (8, 8))
    u = compute_density_for_timestep_sampling(scheme, count, **settings, generator=torch.Generator().manual_seed(3))
    expected = table[(u * 1000).long()]
    at = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(found.quantile(at), expected.quantile(at), rtol=0, atol=0.012)
    assert found.min() > 0
    assert found.max() <= 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flow_times_stay_in_the_table(scheme):
    table = sigmas()
    extreme = torch.tensor([[0.0, 0], [2**-24, 0], [1 - 2**-24, 0], [1.0, 0]])
    times = RectifiedFlow(table, scheme).draw_times(extreme, (8, 8))
    assert torch.isin(times, table).all()


def test_flow_evaluates_at_uniform_sigmas_whatever_the_density():
    positions = (torch.arange(8) + 0.5) / 8
    for objective in (RectifiedFlow(sigmas(shift=3.0)), RectifiedFlow(sigmas(), "logit_normal")):
        torch.testing.assert_close(objective.spread_times(positions), positions)


def test_small_numbers_are_much_noise():
    """As in diffusers, whose sigmas fall from 1."""
    times = RectifiedFlow(sigmas()).draw_times(torch.tensor([[0.01, 0.0], [0.99, 0.0]]), (8, 8))
    assert times[0] > 0.98
    assert math.isclose(times[1], 0.01, abs_tol=0.002)


def test_constants_go_to_a_device_once(batch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Diffusion(ddpm().alphas_cumprod, "v_prediction", snr_gamma=5.0)
    latents, noise, times = (x.to("meta") for x in (batch.latents, batch.noise, batch.times))
    copied = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: copied.append(x.shape) or original(x, *a, **k))
    for _ in range(3):
        objective.corrupt(latents, noise, times), objective.target(latents, noise, times), objective.weight(times)
    assert copied.count(objective.alphas_cumprod.shape) == 1


def test_errors_count_where_the_mask_is_white():
    prediction, target = torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    target[:, :, :, :2] = 2.0  # an error of 4 on the left, none on the right
    left, both, none = torch.zeros(1, 4, 4), torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    left[:, :, :2] = 1.0
    masks = torch.stack([left, both, none])
    assert squared_errors(prediction, target, masks).tolist() == [4.0, 2.0, 0.0]
    assert squared_errors(prediction, target).tolist() == [2.0, 2.0, 2.0]
    grey = torch.full((3, 1, 4, 4), 0.5)  # what matters is the share of a place, not how bright the mask is
    assert squared_errors(prediction, target, grey).tolist() == [2.0, 2.0, 2.0]
