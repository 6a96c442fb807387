"""Stage `autoencoder`: pixels (3, 64, 64) <-> latents (4, 16, 16)."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from pretraining import data
from pretraining.optim import PretrainingRecipe, PretrainingRun, load_average

CHANNELS = (32, 32, 32)  # equal widths and few layers beat the usual pyramid at this size
BATCH = 32
ABSTRACT_SHARE = 0.5
MUON_LR, ADAMW_LR = 3e-3, 1.5e-3
REFINE_LR = 2e-3
ANCHOR = 1.0  # weight of the latents' drift (variance 1) in the `refine` stage
REFINE_NOISE = 0.05  # of standardised latents
LATENT_NOISE = 0.1  # standard deviation; makes neighbouring latents decode alike, which the denoiser needs


def build() -> AutoencoderKL:
    """An untrained autoencoder."""
    depth = len(CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=CHANNELS,
        layers_per_block=0,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def encode(model: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latent means (n, 4, 16, 16); the log-variance is not trained, and export sets it far down."""
    return model.quant_conv(model.encoder(pixels))[:, :4]


def decode(model: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pixels (n, 3, 64, 64)."""
    return model.decoder(model.post_quant_conv(latents))


def reconstruction_loss(output: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 + 2 MSE + 0.3 gradient difference."""
    error = output - pixels
    gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.3 * gradients


def loss_of(model: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The reconstruction loss and a pull of the latents to zero."""
    latents = encode(model, pixels)
    output = decode(model, latents + LATENT_NOISE * torch.randn_like(latents))
    return reconstruction_loss(output, pixels) + 1e-3 * latents.square().mean()


@torch.no_grad()
def psnr(model: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, dB (peak-to-peak range 2)."""
    output = decode(model, encode(model, pixels)).clamp(-1, 1)
    return (10 * torch.log10(4 / (output - pixels).square().mean((1, 2, 3)))).mean().item()


def train(folder: Path, minutes: float, device: torch.device) -> None:
    """Train for `minutes`; checkpoint (and resume) as autoencoder.pt in `folder`."""
    captioned, abstract = (data.load_pictures(folder, name) for name in ("captioned", "abstract"))
    torch.manual_seed(0)
    run = PretrainingRun(build(), PretrainingRecipe("autoencoder", minutes, MUON_LR, ADAMW_LR), folder, device)
    rng = np.random.default_rng(run.step)
    test = data.held_out_pictures(128)[0].to(device)
    while run.unfinished:
        loss = loss_of(run.model, _batch(captioned, abstract, rng).to(device))
        run.update(loss, lambda: f"psnr {psnr(run.average.module, test):.2f} dB")


def _batch(captioned: np.ndarray, abstract: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """BATCH pictures, ABSTRACT_SHARE of them uncaptioned."""
    count = round(BATCH * ABSTRACT_SHARE)
    parts = [
        captioned[rng.integers(len(captioned), size=BATCH - count)],
        abstract[rng.integers(len(abstract), size=count)],
    ]
    return data.to_tensor(np.concatenate(parts))


def refine(folder: Path, minutes: float, device: torch.device) -> None:
    """Stage `refine`: train on, but hold the latents of captioned pictures where the denoiser was trained on them.

    It can run beside or after the `unet` stage: uncaptioned pictures may move freely, so unseen subjects reconstruct
    better while latents.pt stays valid. Checkpoints (and resumes) as refined.pt, a standardised autoencoder.
    """
    captioned, abstract = (data.load_pictures(folder, name) for name in ("captioned", "abstract"))
    anchors = torch.load(folder / "latents.pt", weights_only=True, mmap=True)
    torch.manual_seed(0)
    start = load_standardised(folder).train().requires_grad_(True)
    run = PretrainingRun(start, PretrainingRecipe("refined", minutes, REFINE_LR, REFINE_LR / 2), folder, device)
    rng = np.random.default_rng(run.step)
    test, half = data.held_out_pictures(128)[0].to(device), BATCH // 2
    while run.unfinished:
        named, unnamed = rng.integers(len(captioned), size=half), rng.integers(len(abstract), size=BATCH - half)
        pixels = data.to_tensor(np.concatenate([captioned[named], abstract[unnamed]])).to(device)
        latents = encode(run.model, pixels)
        drift = (latents[:half] - anchors[named].to(device).float()).square().mean()
        noisy = latents + REFINE_NOISE * torch.randn_like(latents)
        loss = reconstruction_loss(decode(run.model, noisy), pixels) + ANCHOR * drift

        def report(drift: torch.Tensor = drift) -> str:
            return f"drift {drift.item():.4f} psnr {psnr(run.average.module, test):.2f} dB"

        run.update(loss, report)


@torch.no_grad()
def load_standardised(folder: Path) -> AutoencoderKL:
    """The trained average, with each latent channel's mean and deviation folded into the 1x1 convolutions.

    Latents then have mean 0 and deviation 1 with a scaling factor of 1.
    """
    model = load_average(build(), folder, "autoencoder")
    pictures = data.load_pictures(folder, "captioned")[:2000]
    latents = torch.cat([encode(model, data.to_tensor(pictures[i : i + 50])) for i in range(0, len(pictures), 50)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = model.quant_conv, model.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= deviation.view(1, 4, 1, 1)
    before.bias[:4] = (before.bias[:4] - mean) / deviation
    before.weight[:4] /= deviation.view(4, 1, 1, 1)
    before.weight[4:], before.bias[4:] = 0.0, -30.0  # the log-variance: sampling the latents adds nothing
    return model
