"""Rectified flow against diffusers' schedulers and training utilities, and formulas written down independently."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from dreamlora.objectives import RectifiedFlow, TrainingLoss
from dreamlora.objectives.densities import LogitNormal, Mode, Uniform, beta, table
from dreamlora.objectives.flow import Shift

SIDES = (8, 8)
DENSITIES = {
    "none": Uniform(),
    "logit_normal": LogitNormal(0.6, 0.7),
    "mode": Mode(1.2),
}
MORE = {**DENSITIES, "beta": beta(2.0, 5.0), "table": table([1, 0, 3])}


def sigmas(**config) -> torch.Tensor:
    return FlowMatchEulerDiscreteScheduler(**config).sigmas


def in_order(count: int) -> torch.Tensor:
    """Uniform numbers ``[count, 2]``, ascending."""
    return torch.stack([(torch.arange(count) + 0.5) / count, torch.zeros(count)], 1)


@pytest.fixture
def batch() -> SimpleNamespace:
    latents, noise = torch.randn(2, 5, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(latents=latents, noise=noise)


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


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_flow_weights_equal_diffusers(weighting):
    times = sigmas(shift=3.0)[::9]
    found = RectifiedFlow(sigmas(), weighting=weighting).weight(times)
    torch.testing.assert_close(found, compute_loss_weighting_for_sd3(weighting, times))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_a_preconditioned_loss_is_that_of_diffusers_sd3_script(batch, weighting):
    """train_dreambooth_lora_sd3.py with its default --precondition_outputs 1: the error is the image's."""
    objective = RectifiedFlow(sigmas(), weighting=weighting, preconditioned=True)
    times = torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0])
    prediction = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    noisy = objective.corrupt(batch.latents, batch.noise, times)
    s = times.reshape(-1, 1, 1, 1)
    weighting_of_script = compute_loss_weighting_for_sd3(weighting, s)
    image = prediction * (-s) + noisy
    expected = (weighting_of_script * (image - batch.latents) ** 2).reshape(5, -1).mean(1)
    target = objective.target(batch.latents, batch.noise, times)
    found = objective.weight(times) * objective.errors(prediction, target, times)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", DENSITIES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_density_equals_diffusers(scheme, shift):
    """Quantiles of the times of 40,000 uniforms in order against 40,000 random draws of diffusers' function, which are
    indices into the sigmas of a scheduler that is shifted."""
    count, grid = 40_000, sigmas(shift=shift)
    objective = RectifiedFlow(sigmas(), DENSITIES[scheme], Shift(lambda sides: shift))
    found = objective.draw_times(in_order(count), SIDES)
    settings = {"logit_mean": 0.6, "logit_std": 0.7, "mode_scale": 1.2}
    u = compute_density_for_timestep_sampling(scheme, count, **settings, generator=torch.Generator().manual_seed(3))
    expected = grid[(u * 1000).long()]
    at = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(found.quantile(at), expected.quantile(at), rtol=0, atol=0.012)
    assert torch.isin(found, grid).all(), "bit for bit those of the scheduler"


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.93])
def test_shifted_times_are_those_of_a_shifted_scheduler_bit_for_bit(shift):
    found = RectifiedFlow(sigmas(), shift=Shift(lambda sides: shift)).draw_times(in_order(1000), SIDES)
    assert torch.equal(found, sigmas(shift=shift))


@pytest.mark.parametrize("terminal", [0.02, 0.3])
def test_times_end_where_the_scheduler_s_do(terminal):
    """Qwen-Image's scheduler stretches its sigmas to shift_terminal."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal)
    scheduler.set_timesteps(sigmas=sigmas().tolist(), mu=0.8)
    shift = Shift(lambda sides: math.exp(0.8), terminal)
    found = RectifiedFlow(sigmas(), shift=shift).draw_times(in_order(1000), SIDES)
    torch.testing.assert_close(found, scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    assert found[-1].item() == pytest.approx(terminal)
    assert found[0] == 1


def test_an_inverse_shift_is_a_shift_seen_from_the_other_end():
    """diffusers' Lumina2 script lets σ = 1 be the image, and draws σ from a scheduler of shift 6 (docs/training.md)."""
    objective = RectifiedFlow(sigmas(), shift=Shift(lambda sides: 1 / 6))
    found = objective.draw_times(in_order(1000), SIDES)
    noise_of_script = 1 - sigmas(shift=6.0)
    torch.testing.assert_close(found.flip(0)[:-1], noise_of_script[1:], rtol=0, atol=1e-5)


def test_the_shift_is_that_of_the_sides():
    objective = RectifiedFlow(sigmas(), shift=Shift(lambda sides: sides[0] / sides[1]))
    uniforms = torch.tensor([[0.5, 0.0]])
    for sides, expected in (((8, 8), 0.5), ((24, 8), 0.75), ((8, 24), 0.25)):
        assert objective.draw_times(uniforms, sides).item() == pytest.approx(expected)


@pytest.mark.parametrize("density", MORE.values(), ids=MORE)
def test_flow_times_stay_in_the_grid(density):
    grid = sigmas()
    extreme = torch.tensor([[0.0, 0], [2**-24, 0], [1 - 2**-24, 0], [1.0, 0]])
    times = RectifiedFlow(grid, density).draw_times(extreme, SIDES)
    assert torch.isin(times, grid).all()


def test_flow_evaluates_at_uniform_sigmas_whatever_density_and_shift():
    positions = (torch.arange(8) + 0.5) / 8
    shift = Shift(lambda sides: 3.0, 0.02)
    for objective in (RectifiedFlow(sigmas(), shift=shift), RectifiedFlow(sigmas(), LogitNormal())):
        torch.testing.assert_close(objective.spread_times(positions), positions)


@pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES)
def test_small_numbers_are_much_noise(density):
    """As in diffusers, whose sigmas fall from 1; for "mode" its formula is the other way round."""
    times = RectifiedFlow(sigmas(), density).draw_times(torch.tensor([[0.01, 0.0], [0.99, 0.0]]), SIDES)
    assert (times[0] > times[1]) == (not isinstance(density, Mode))


@pytest.mark.parametrize("schedule", ["exponential", "constant", "snr"])
def test_the_threshold_of_huber_goes_by_sigma(schedule):
    """kohya's scripts for FLUX: time steps of 1000 σ in the place of indices; their noise-to-signal σ / (1 - σ)."""
    c, sigma = 0.2, torch.tensor([0.001, 0.25, 0.5, 1.0])
    ratio = sigma.double() / (1 - sigma.double())
    delta = {
        "exponential": torch.exp(math.log(c) / 1000 * (1000 * sigma.double())),
        "constant": torch.full((4,), c),
        "snr": (1 - c) / (1 + ratio) ** 2 + c,
    }[schedule]
    far = torch.full((4, 1, 1, 1), 100.0)
    found = RectifiedFlow(sigmas(), loss=TrainingLoss("huber", schedule, c)).errors(far, torch.zeros_like(far), sigma)
    expected = 2 * delta * ((100.0**2 + delta.double() ** 2).sqrt() - delta)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=0)
