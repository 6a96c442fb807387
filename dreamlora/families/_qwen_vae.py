"""AutoencoderKLQwenImage: made for videos, of which an image is one frame; each channel has statistics of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.interfaces import Classes, Components, Latents, LatentSize, ModelSource
from dreamlora.models import loading

CLASSES: Classes = ("diffusers.AutoencoderKLQwenImage",)


def pixels_per_latent(source: ModelSource) -> int:
    """Pixels along a side that one latent stands for, as the pipelines count it: each downsampling halves the sides.

    Raises:
        UserError: the autoencoder's config has no list of them.
    """
    steps = loading.read_config(source, "vae").get("temperal_downsample")
    if not isinstance(steps, list) or not 1 <= len(steps) <= loading.MOST_SIZES:
        raise UserError(
            f"{loading.place_of(source, 'vae')}: its config has no list of downsamplings (temperal_downsample); is it "
            "an autoencoder of Qwen-Image?"
        )
    return int(2 ** len(steps))


def latent_size(source: ModelSource) -> LatentSize | None:
    """See ``Family.latent_size``."""
    channels = loading.read_config(source, "vae").get("z_dim")
    return LatentSize(channels, pixels_per_latent(source)) if isinstance(channels, int) else None


def encode_images(vae: Components, pixels: Tensor) -> Latents:
    """Moments ``[B, C, h, w]`` of the posterior of ``(z - latents_mean) / latents_std``; see ``Family.encode_images``.

    Raises:
        UserError: the autoencoder has not one mean and one standard deviation for each channel.
    """
    model = vae["vae"]
    mean, std = (_of_channels(model, name) for name in ("latents_mean", "latents_std"))
    posterior = model.encode(pixels[:, :, None].to(device=model.device, dtype=model.dtype)).latent_dist
    return Latents(mean=(posterior.mean[:, :, 0].float() - mean) / std, std=posterior.std[:, :, 0].float() / std)


def _of_channels(model: Any, name: str) -> Tensor:
    """``[C, 1, 1]``."""
    values = model.config[name]
    if len(values) != model.config.z_dim:
        raise UserError(
            f"the autoencoder's config has {len(values)} numbers as {name}, where one for each of its "
            f"{model.config.z_dim} channels is expected: download or export the model again"
        )
    return torch.tensor(values, device=model.device)[:, None, None]
