"""Diffusion against diffusers' schedulers and training utilities, and against formulas written down independently."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from dreamlora.errors import UserError
from dreamlora.objectives import Diffusion, TrainingLoss

PREDICTIONS = ["epsilon", "v_prediction"]
SIDES = (8, 8)


def ddpm(**config) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)


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
    times = objective.draw_times(uniforms, SIDES)
    assert times.dtype == torch.int64
    assert torch.bincount(times, minlength=1000).tolist() == [4] * 1000
    assert objective.spread_times(torch.tensor([0.0005, 0.5, 0.9999])).tolist() == [0, 500, 999]
    extreme = torch.tensor([[1 - 2**-24, 0], [1.0, 0], [0.0, 0]])
    assert objective.draw_times(extreme, SIDES).tolist() == [999, 999, 0]


def test_unknown_prediction_type():
    with pytest.raises(UserError, match=r"'sample'.*epsilon, v_prediction"):
        Diffusion(ddpm().alphas_cumprod, "sample")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_debiased_estimation_weights(prediction):
    """arXiv 2310.08442, equation 9, with the cut of kohya's sd-scripts: SNR of at most 1000."""
    scheduler = ddpm()
    times = torch.arange(0, 1000, 7)
    snr = compute_snr(scheduler, times).double().numpy()
    assert snr[0] > 1000 > snr[-1], "both sides of the cut are tried"
    cut = np.minimum(snr, 1000)
    expected = 1 / np.sqrt(cut) if prediction == "epsilon" else 1 / (cut + 1)
    found = Diffusion(scheduler.alphas_cumprod, prediction, debiased=True).weight(times)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_debiased_estimation_and_others_are_not_combined():
    alphas = ddpm().alphas_cumprod
    with pytest.raises(UserError, match="either --snr_gamma or --debiased_estimation_loss"):
        Diffusion(alphas, "epsilon", 5.0, debiased=True)


def test_debiased_estimation_has_no_infinite_weight():
    alphas = ddpm(rescale_betas_zero_snr=True).alphas_cumprod
    with pytest.raises(UserError, match=r"signal-to-noise ratio, which is zero .*--prediction_type v_prediction"):
        Diffusion(alphas, "epsilon", debiased=True)
    weight = Diffusion(alphas, "v_prediction", debiased=True).weight(torch.arange(1000))
    assert weight.isfinite().all() and weight[-1] == 1


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
def test_the_threshold_of_huber_falls_with_the_noise_as_in_kohya_s_scripts(loss_type, schedule):
    """train_util.get_huber_threshold_if_needed and conditional_loss, in float64."""
    scheduler, c, scale = ddpm(), 0.2, 3.0
    times = torch.tensor([0, 1, 250, 700, 999])
    alphas, t = scheduler.alphas_cumprod.double().numpy()[times], times.double().numpy()
    threshold = {
        "snr": (1 - c) / (1 + np.sqrt((1 - alphas) / alphas)) ** 2 + c,
        "exponential": np.exp(np.log(c) / 1000 * t) * scale,
        "constant": np.full(5, c * scale),
    }[schedule]
    draw = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 4, 3, 6, generator=draw)
    delta = threshold.reshape(5, 1, 1, 1)
    values = 2 * (np.sqrt((prediction - target).double().numpy() ** 2 + delta**2) - delta)
    expected = (values * delta if loss_type == "huber" else values).mean((1, 2, 3))
    objective = Diffusion(scheduler.alphas_cumprod, loss=TrainingLoss(loss_type, schedule, c, scale))
    np.testing.assert_allclose(objective.errors(prediction, target, times).numpy(), expected, rtol=1e-5)


def test_snr_threshold_of_pure_noise_is_finite():
    alphas = ddpm(rescale_betas_zero_snr=True).alphas_cumprod
    objective = Diffusion(alphas, "v_prediction", loss=TrainingLoss("huber", "snr", 0.1))
    far = torch.full((1, 1, 1, 1), 1e4)
    error = objective.errors(far, torch.zeros_like(far), torch.tensor([999]))
    assert error.item() == pytest.approx(2 * 0.1 * (1e4 - 0.1), rel=1e-5), "linear above the threshold c"


def test_constants_go_to_a_device_once(batch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Diffusion(ddpm().alphas_cumprod, "v_prediction", snr_gamma=5.0)
    latents, noise, times = (x.to("meta") for x in (batch.latents, batch.noise, batch.times))
    copied = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: copied.append(x.shape) or original(x, *a, **k))
    for _ in range(3):
        objective.corrupt(latents, noise, times), objective.target(latents, noise, times), objective.weight(times)
    assert copied.count(objective.alphas_cumprod.shape) == 1
