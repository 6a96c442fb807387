"""Every family's autoencoder in tiles, and several images one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny
from torch import Tensor

from dreamlora import registry
from dreamlora.config import Model
from dreamlora.models.loading import resolve_source
from dreamlora.models.tiling import TILE, can_tile, one_by_one, tiled


@pytest.fixture(params=registry.names("families"))
def case(request: pytest.FixtureRequest, tiny_folder: Callable[[str], Path]) -> tuple[Any, Any]:
    """A family and its small autoencoder, with tiles that are as much smaller than the images as 512 are than 1024."""
    family = registry.load("families", request.param)
    source = resolve_source(Model(pretrained_model_name_or_path=str(tiny_folder(request.param))))
    vae: Any = family.load(source, "vae", torch.float32)["vae"]
    if hasattr(vae, "tile_sample_min_height"):
        vae.tile_sample_min_height = vae.tile_sample_min_width = 16
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = 8
        if hasattr(vae, "tile_latent_min_height"):
            vae.tile_latent_min_height = vae.tile_latent_min_width = 16 // vae.spatial_compression_ratio
    return family, vae


def smooth(side: int) -> Tensor:
    rows = torch.linspace(-1, 1, side)
    return torch.stack([rows[:, None] * rows, rows.expand(side, side), -rows[:, None].expand(side, side)])[None]


def likeness(first: Tensor, second: Tensor) -> float:
    assert first.shape == second.shape
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))


@torch.no_grad()
def test_tiles_are_nearly_the_whole_image(case: tuple[Any, Any]) -> None:
    family, vae = case
    tile = getattr(vae, "tile_sample_min_size", 16)
    pixels = smooth(2 * tile)
    plain = family.encode_images({"vae": vae}, pixels).mean
    assert can_tile(vae)
    with tiled(vae, True):
        in_tiles = family.encode_images({"vae": vae}, pixels).mean
    with tiled(vae, None):
        assert torch.equal(family.encode_images({"vae": vae}, pixels).mean, plain), "as it was"
    assert not torch.equal(in_tiles, plain) and likeness(in_tiles, plain) > 0.3, "of random weights"
    first = family.encode_images({"vae": vae}, pixels[..., :tile, :tile]).mean
    torch.testing.assert_close(in_tiles[..., :1, :1], first[..., :1, :1])


def kl(sample_size: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=sample_size,
    ).eval()


def test_tiles_are_smaller_than_what_large_models_were_trained_at() -> None:
    """SDXL's autoencoder has tiles of 1024 pixels of its own, which would never be needed."""
    vae = kl(1024)
    with tiled(vae, True):
        assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (TILE, TILE // 2)
    assert (vae.use_tiling, vae.tile_sample_min_size, vae.tile_latent_min_size) == (False, 1024, 512)
    small = kl(32)
    with tiled(small, True):
        assert (small.use_tiling, small.tile_sample_min_size) == (True, 32)


@torch.no_grad()
def test_one_by_one_gives_the_same(case: tuple[Any, Any]) -> None:
    _, vae = case
    pixels = torch.cat([smooth(16), -smooth(16)])
    pixels = pixels[:, :, None] if "Qwen" in type(vae).__name__ else pixels
    encoded = vae.encode(pixels)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    plain, sizes = vae.decode(latents).sample, []
    handle = vae.decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with one_by_one(vae):
        single = vae.decode(latents).sample
    handle.remove()
    assert set(sizes) == {1} and not vae.use_slicing
    torch.testing.assert_close(single, plain, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_done_is_left_out() -> None:
    other = AsymmetricAutoencoderKL(norm_num_groups=32)
    assert not can_tile(other)
    with tiled(other, True), one_by_one(other):
        assert not hasattr(other, "use_tiling")
    assert can_tile(AutoencoderTiny())
