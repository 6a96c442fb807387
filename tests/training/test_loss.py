"""The loss of a micro-batch against an independent computation; and that its options reach a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

from dreamlora.config import Train
from dreamlora.errors import UserError
from dreamlora.families import flux, sd
from dreamlora.interfaces import Batch
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop

pytestmark = pytest.mark.usefixtures("no_report")

SIDES = (4, 6)


def batch(times: Tensor) -> Batch:
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, *SIDES, generator=draw)
    masks = torch.zeros(3, 1, *SIDES)
    masks[:, :, :, :3] = 1.0
    weights = torch.tensor([0.5, 0.25, 0.25])
    return Batch(latents, noise, times, {}, weights, ("a", "b", "c"), masks)


def loss_of(objective: Any, samples: Batch, prediction: Tensor) -> tuple[float, Tensor]:
    """What the loop makes of a batch, and what the model saw."""
    seen: list[Tensor] = []

    def model(noisy: Tensor, times: Tensor, conditioning: Any) -> Tensor:
        seen.append(noisy)
        return prediction

    config = SimpleNamespace(train=Train())
    accelerator = SimpleNamespace(process_index=0, device=torch.device("cpu"))
    run: Any = SimpleNamespace(config=config, accelerator=accelerator, step=0, objective=objective, model=model)
    return float(loop.micro_batch_loss(run, [samples], 0)), seen[0]


def test_of_a_rectified_flow() -> None:
    train = Train(weighting_scheme="cosmap", loss_type="huber", huber_schedule="exponential", unmasked_weight=0.2)
    times = torch.tensor([0.1, 0.5, 1.0])
    samples = batch(times)
    prediction = torch.randn(samples.latents.shape, generator=torch.Generator().manual_seed(1))
    found, noisy = loss_of(flux.objective(FlowMatchEulerDiscreteScheduler(), train), samples, prediction)
    x, e, p, sigma = (t.double().numpy() for t in (samples.latents, samples.noise, prediction, times))
    s = sigma.reshape(3, 1, 1, 1)
    np.testing.assert_allclose(noisy.numpy(), (1 - s) * x + s * e, rtol=1e-5, atol=1e-6)
    delta = 0.1**s
    places = (2 * delta * (np.sqrt((p - (e - x)) ** 2 + delta**2) - delta)).mean(1)
    mask = np.where(np.arange(6) < 3, 1.0, 0.2) * np.ones((3, 4, 6))
    errors = (places * mask).sum((1, 2)) / mask.sum((1, 2))
    weights = 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2))
    assert found == pytest.approx(float((np.array([0.5, 0.25, 0.25]) * weights * errors).sum()), rel=1e-5)


def test_of_diffusion() -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    train = Train(prediction_type="v_prediction", debiased_estimation_loss=True, rescale_betas_zero_snr=True)
    times = torch.tensor([10, 500, 999])
    samples = batch(times)
    prediction = torch.randn(samples.latents.shape, generator=torch.Generator().manual_seed(1))
    found, noisy = loss_of(sd.objective(scheduler, train), samples, prediction)
    x, e, p = (t.double().numpy() for t in (samples.latents, samples.noise, prediction))
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    root = ((root - root[-1]) * root[0] / (root[0] - root[-1]))[times.numpy()]
    a, b = root.reshape(3, 1, 1, 1), np.sqrt(1 - root.reshape(3, 1, 1, 1) ** 2)
    np.testing.assert_allclose(noisy.numpy(), a * x + b * e, rtol=1e-3, atol=1e-4)
    errors = ((p - (a * e - b * x)) ** 2).mean(1)[:, :, :3].mean((1, 2))
    snr = np.minimum(root**2 / (1 - root**2), 1000)
    expected = (np.array([0.5, 0.25, 0.25]) / (snr + 1) * errors).sum()
    assert found == pytest.approx(float(expected), rel=1e-3)


def first_loss(run: RunFolder) -> float:
    return next(row["value"] for row in run.metrics() if row["name"] == "eval/loss")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd", "--loss_type huber --snr_gamma 5"),
        ("flux", "--timestep_sampling beta --timestep_beta 2,5 --timestep_shift 3 --loss_type l1"),
    ],
)
def test_options_change_what_is_trained_and_not_what_is_measured(
    family: str, options: str, train: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(f"{family}_folder"))
    common = [
        "--pretrained_model_name_or_path",
        folder,
        "--max_train_steps",
        "2",
        "--sample_steps",
        "0",
        "--no_parity_check",
    ]
    plain = train(*common, "--output_dir", str(tmp_path / "plain"))
    other = train(*common, *options.split(), "--output_dir", str(tmp_path / "other"))
    assert first_loss(plain) == first_loss(other)
    weights = [load_file(run.lora_file) for run in (plain, other)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    more = ["--max_train_steps", "3", "--output_dir", str(other.path), "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=r"loss_type: '(huber|l1)' then, 'l2' now"):
        train(*common, *more)
    assert train(*common, *options.split(), *more).checkpoint_steps()[-1] == 3


def test_zero_terminal_snr_is_that_of_training_loss_and_samples(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamlora.sampling import sampler

    used: list[Any] = []
    original = sampler.deterministic
    monkeypatch.setattr(sampler, "deterministic", lambda scheduler: used.append(scheduler) or original(scheduler))
    options = [
        "--prediction_type",
        "v_prediction",
        "--max_train_steps",
        "1",
        "--sample_steps",
        "1",
        "--no_parity_check",
    ]
    plain = train(*options, "--output_dir", str(tmp_path / "plain"))
    zero = train(*options, "--rescale_betas_zero_snr", "--output_dir", str(tmp_path / "zero"))
    assert [bool(scheduler.config.get("rescale_betas_zero_snr")) for scheduler in (used[0], used[-1])] == [False, True]
    assert used[-1].alphas_cumprod[-1] < 1e-6 and used[-1].config.timestep_spacing == "trailing"
    assert first_loss(plain) != first_loss(zero)
