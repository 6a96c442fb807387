"""What options and scheduler configs make of the times of rectified flows."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from dreamlora import registry
from dreamlora.config import Train
from dreamlora.errors import UserError
from dreamlora.families import _flow
from dreamlora.objectives import RectifiedFlow, TrainingLoss, densities

UNIFORMS = torch.stack([(torch.arange(1000) + 0.5) / 1000, torch.zeros(1000)], 1)
DEV = {"use_dynamic_shifting": True, "shift": 3.0}
"""FLUX.1-dev's."""
QWEN = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}


def scheduler(**config) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**config)


def times(objective: RectifiedFlow, sides: tuple[int, int] = (64, 64)) -> torch.Tensor:
    """Of 1000 numbers in order: the whole grid, if the density is uniform."""
    return objective.draw_times(UNIFORMS, sides)


@pytest.mark.parametrize("config", [DEV, {"shift": 1.0}], ids=["dev", "schnell"])
@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
def test_flux_1_draws_what_diffusers_script_draws(config, scheme):
    """Bit for bit what earlier versions drew: an index into a fresh scheduler's sigmas, which are unshifted."""
    flux = registry.load("families", "flux")
    objective = flux.objective(scheduler(**config), Train(weighting_scheme=scheme, logit_mean=0.3, mode_scale=1.1))
    u = UNIFORMS[:, 0]
    if scheme == "logit_normal":
        u = torch.sigmoid(0.3 + 1.0 * torch.special.ndtri(u.double()))
    elif scheme == "mode":
        u = 1 - u - 1.1 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    expected = scheduler(**config).sigmas[(u * 1000).long().clamp(0, 999)]
    assert torch.equal(times(objective), expected)


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_static_shift_is_the_scheduler_s(kind):
    """SD3, Z-Image, Sana, Lumina2: whatever sampler the pipeline comes with, and whatever it was set to."""
    own = kind(shift=3.0)
    own.set_timesteps(4)
    objective = _flow.objective(own, Train(), shift="scheduler")
    assert torch.equal(times(objective), scheduler(shift=3.0).sigmas)


@pytest.mark.parametrize("sides", [(32, 32), (64, 96), (128, 128), (256, 256), (2, 2)])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("config", [DEV, QWEN], ids=["dev", "qwen"])
def test_a_dynamic_shift_is_what_the_pipeline_samples_with(config, kind, sides):
    own = scheduler(**config, time_shift_type=kind)
    c = own.config
    tokens = sides[0] * sides[1] // 4
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    own.set_timesteps(sigmas=scheduler().sigmas.tolist(), mu=mu)
    objective = _flow.objective(own, Train(timestep_shift="scheduler"), shift="none")
    torch.testing.assert_close(times(objective, sides), own.sigmas[:-1], rtol=0, atol=1e-6)


def test_a_family_may_have_a_mu_and_a_patch_of_its_own():
    """FLUX.2: latents that are patchified already, and another function of the tokens."""
    seen = []

    def mu(tokens: int) -> float:
        seen.append(tokens)
        return math.log(4.0)

    objective = _flow.objective(scheduler(**DEV), Train(), shift="scheduler", patch=1, mu=mu)
    torch.testing.assert_close(times(objective, (6, 8)), scheduler(shift=4.0).sigmas)
    assert set(seen) == {48}


@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [
        (None, "none", 1.0),
        (None, 3.0, 3.0),
        (None, "scheduler", 2.0),
        ("none", "scheduler", 1.0),
        ("scheduler", 3.0, 2.0),
        ("2.5", "scheduler", 2.5),
    ],
)
def test_what_is_asked_for_takes_the_place_of_the_family_s_shift(asked, own, expected):
    objective = _flow.objective(scheduler(shift=2.0), Train(timestep_shift=asked), shift=own)
    assert torch.equal(times(objective), scheduler(shift=expected).sigmas)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, densities.LogitNormal(0.0, 1.5)),
        ({"weighting_scheme": "none"}, densities.LogitNormal(0.0, 1.5)),
        ({"weighting_scheme": "sigma_sqrt"}, densities.Uniform()),
        ({"timestep_sampling": "uniform"}, densities.Uniform()),
        ({"weighting_scheme": "mode", "mode_scale": 0.8}, densities.Mode(0.8)),
        ({"timestep_sampling": "mode", "weighting_scheme": "cosmap"}, densities.Mode(1.29)),
        ({"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 2.0}, densities.LogitNormal(0.5, 2.0)),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": 0.7, "logit_mean": 9.0}, densities.LogitNormal(0.0, 0.7)),
    ],
)
def test_the_density_is_the_one_that_is_named_else_the_family_s(options, expected):
    objective = _flow.objective(scheduler(), Train(**options), density=densities.LogitNormal(0.0, 1.5))
    assert objective.density == expected


def test_betas_and_tables_are_of_sigma():
    found = times(_flow.objective(scheduler(), Train(timestep_sampling="beta", timestep_beta=(4.0, 2.0))))
    assert found.mean().item() == pytest.approx(4 / 6, abs=2e-3), "more noise than image"
    train = Train(timestep_sampling="table", timestep_table=("0", "0", "0", "1"))
    assert times(_flow.objective(scheduler(), train)).min() >= 0.75, "the last part is noise"


def test_loss_and_weighting_are_as_the_options_say():
    train = Train(weighting_scheme="cosmap", precondition_outputs=1, loss_type="l1", unmasked_weight=0.1)
    objective = _flow.objective(scheduler(), train)
    assert (objective.weighting, objective.preconditioned) == ("cosmap", True)
    assert objective.loss == TrainingLoss("l1", unmasked_weight=0.1)
    assert not _flow.objective(scheduler(), Train()).preconditioned, "not by default, as other families' scripts"


@pytest.mark.parametrize(
    "option",
    [
        {"snr_gamma": 5.0},
        {"prediction_type": "epsilon"},
        {"debiased_estimation_loss": True},
        {"rescale_betas_zero_snr": True},
    ],
    ids=str,
)
def test_options_of_diffusion_models_are_refused(option):
    with pytest.raises(UserError, match=f"--{next(iter(option))} is for diffusion models"):
        _flow.objective(scheduler(), Train(**option))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"shift": 0.0}, "shift: 0"),
        ({"shift": -3.0}, "shift: -3"),
        ({"shift": 1e9}, "shift: 1000000000"),
        ({**DEV, "max_shift": 1e6}, "max_shift: 1000000"),
        ({**DEV, "base_image_seq_len": 4096}, "base_image_seq_len 4096 and max_image_seq_len 4096"),
        ({**DEV, "max_image_seq_len": -1}, "max_image_seq_len: -1"),
        ({"shift_terminal": 1.5}, "shift_terminal: 1.5"),
    ],
)
def test_a_config_without_a_usable_shift_is_refused_where_it_counts(config, name):
    own = SimpleNamespace(config={"num_train_timesteps": 1000, **config})
    with pytest.raises(UserError, match=rf"scheduler_config.json says {name}.*give --timestep_shift none"):
        _flow.objective(own, Train(), shift="scheduler")
    assert torch.equal(times(_flow.objective(own, Train(timestep_shift="none"))), scheduler().sigmas)


def test_families_of_rectified_flows_name_all_of_its_options():
    """Else a run says that an option which counts has no effect."""
    for name in registry.names("families"):
        family = registry.load("families", name)
        if "weighting_scheme" in family.OWN_OPTIONS:
            assert set(_flow.OWN_OPTIONS) <= set(family.OWN_OPTIONS), name
            assert not set(_flow.OF_DIFFUSION) & set(family.OWN_OPTIONS), name
