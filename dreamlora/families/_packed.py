"""Latents as the tokens of transformers that are given them in patches of 2 x 2 (FLUX.1 and what was made like it)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.families import _parts
from dreamlora.interfaces import Components, Conditioning


def pack(latents: Tensor) -> Tensor:
    """``[B, C, h, w]`` as tokens ``[B, h w / 4, 4 C]``: a token holds (channel, row, column) of a patch.

    Raises:
        UserError: h or w is odd.
    """
    require_patches(latents)
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def require_patches(latents: Tensor) -> None:
    """Raises:
    UserError: h or w of ``[B, C, h, w]`` is odd.
    """
    height, width = latents.shape[2:]
    if height % 2 or width % 2:
        raise UserError(
            "this model sees patches of 2 x 2 latents, so it needs images whose sides are multiples of 16 pixels "
            f"(got latents of {height} x {width})"
        )


def unpack(tokens: Tensor, sides: tuple[int, int]) -> Tensor:
    """Tokens ``[B, h w / 4, 4 C]`` as latents ``[B, C, h, w]`` of these sides (h, w)."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (-1, sides[1] // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@functools.lru_cache(maxsize=64)
def image_ids(rows: int, columns: int, device: torch.device, dtype: torch.dtype, image: int = 0) -> Tensor:
    """Positions ``[rows · columns, 3]`` of an image's tokens: number of the image, row, column.

    Kept for every size: they are made on the CPU, and a copy in each forward pass would wait for all the GPU has to do.
    """
    ids = torch.cartesian_prod(torch.tensor([image]), torch.arange(rows), torch.arange(columns))
    return ids.to(device=device, dtype=dtype)


SHOWN = "conditioning_latents"
"""Latents ``[B, C, h, w]`` of the images before an edit, among the conditioning."""


def conditioning(vae: Components, pixels: Tensor) -> Conditioning:
    """See ``Family.encode_conditioning``: latents of the posterior's mode, as the pipelines that edit have them."""
    return {SHOWN: _parts.vae_latents(vae, pixels).mean}


def with_conditioning(tokens: Tensor, conditioning: Conditioning) -> Tensor:
    """Tokens ``[B, N, 4 C]`` of noisy latents, and behind them those of the images before the edit, if any."""
    shown = conditioning.get(SHOWN)
    return tokens if shown is None else torch.cat([tokens, pack(shown.to(tokens.dtype))], dim=1)


def ids_with_conditioning(ids: Tensor, conditioning: Conditioning) -> Tensor:
    """Positions ``[N, 3]`` with those of the images before the edit behind them, which are image number 1."""
    shown = conditioning.get(SHOWN)
    if shown is None:
        return ids
    return torch.cat([ids, image_ids(shown.shape[2] // 2, shown.shape[3] // 2, ids.device, ids.dtype, 1)])
