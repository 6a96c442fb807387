"""Packing of latents is what diffusers' pipelines do."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from dreamlora.errors import UserError
from dreamlora.families import _packed


def test_tokens_are_those_of_the_stock_pipeline_and_give_the_latents_back():
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    tokens = _packed.pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(_packed.unpack(tokens, (4, 6)), latents)
    assert tokens.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_those_of_the_stock_pipeline(dtype):
    device = torch.device("cpu")
    stock = FluxPipeline._prepare_latent_image_ids(1, 2, 3, device, dtype)
    own, second = _packed.image_ids(2, 3, device, dtype), _packed.image_ids(2, 3, device, dtype, image=1)
    assert torch.equal(own, stock) and own.dtype == dtype
    assert torch.equal(second[:, 1:], stock[:, 1:]) and second[:, 0].tolist() == [1] * 6


def test_odd_sides_are_refused():
    with pytest.raises(UserError, match=r"multiples of 16 pixels \(got latents of 4 x 5\)"):
        _packed.pack(torch.zeros(1, 3, 4, 5))
