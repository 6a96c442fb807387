"""Autoencoders that take large images in tiles, and several images one by one: less memory for a little time.

One by one (slicing) gives the same numbers, but for rounding. Tiles overlap and are blended, but what a convolution or
a normalisation would see beyond a tile's border is lacking: the numbers differ a little. So nothing is tiled that fits
as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

TILE = 512
"""Pixels: largest side of a tile. diffusers takes the size that an autoencoder was trained at, 1024 for SDXL's, which
is as much as its images have."""


def can_tile(vae: Any) -> bool:
    """Whether this autoencoder takes images in tiles; of those that diffusers has, AsymmetricAutoencoderKL does not."""
    return hasattr(vae, "use_tiling")


@contextmanager
def tiled(vae: Any, on: bool | None) -> Iterator[None]:
    """In here it takes images in tiles, if that is wanted; afterwards it is as before."""
    with ExitStack() as stack:
        if on and can_tile(vae):
            stack.enter_context(replaced(vae, "use_tiling", True))
            own = getattr(vae, "tile_sample_min_size", TILE)  # others have two sides, of at most 512
            if own > TILE:
                latent = vae.tile_latent_min_size * TILE // own
                stack.enter_context(replaced(vae, "tile_sample_min_size", TILE))
                stack.enter_context(replaced(vae, "tile_latent_min_size", latent))
        yield


@contextmanager
def one_by_one(vae: Any) -> Iterator[None]:
    """In here several images are encoded and decoded one after the other, where the autoencoder knows how."""
    with ExitStack() as stack:
        if hasattr(vae, "use_slicing"):
            stack.enter_context(replaced(vae, "use_slicing", True))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In here an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
