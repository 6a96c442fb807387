"""What a denoiser is called with in training, and what it is to predict: random tensors, by the class of the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Inputs = tuple[dict[str, Any], Tensor]
"""Keyword arguments of the call, and the target in the shape of what it returns."""


def inputs_of(denoiser: Any, batch: int, side: int, tokens: int) -> Inputs:
    """Of ``batch`` images, each with a prompt of ``tokens`` tokens; in the denoiser's precision, the target in float32.

    Args:
        side: of the square latents, before a transformer takes 2 x 2 of them as one token.
    """
    make = {"UNet2DConditionModel": _unet, "FluxTransformer2DModel": _flux, "Flux2Transformer2DModel": _flux2}
    inputs, target = make[type(denoiser).__name__](denoiser, batch, side, tokens)
    return inputs, target.float()


def _unet(unet: Any, batch: int, side: int, tokens: int) -> Inputs:
    config = unet.config
    inputs: dict[str, Any] = {
        "sample": _noise(unet, batch, config.in_channels, side, side),
        "timestep": torch.randint(1000, (batch,), device=unet.device),
        "encoder_hidden_states": _noise(unet, batch, tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        times = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * batch, device=unet.device)
        inputs["added_cond_kwargs"] = {"text_embeds": _noise(unet, batch, pooled), "time_ids": times}
    return inputs, _noise(unet, batch, config.out_channels, side, side)


def _flux(transformer: Any, batch: int, side: int, tokens: int) -> Inputs:
    config = transformer.config
    inputs = {
        **_packed(transformer, batch, side, tokens),
        "pooled_projections": _noise(transformer, batch, config.pooled_projection_dim),
        "txt_ids": torch.zeros(tokens, 3, device=transformer.device),
        "img_ids": _places(transformer, side, 3),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.ones(batch, device=transformer.device)
    return inputs, _noise(transformer, *inputs["hidden_states"].shape)


def _flux2(transformer: Any, batch: int, side: int, tokens: int) -> Inputs:
    numbers = torch.zeros(tokens, 4, device=transformer.device)
    numbers[:, 3] = torch.arange(tokens)
    inputs = {
        **_packed(transformer, batch, side, tokens),
        "txt_ids": numbers,
        "img_ids": _places(transformer, side, 4),
        "guidance": None,
    }
    return inputs, _noise(transformer, *inputs["hidden_states"].shape)


def _packed(transformer: Any, batch: int, side: int, tokens: int) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": _noise(transformer, batch, side * side // 4, config.in_channels),
        "timestep": torch.rand(batch, device=transformer.device),
        "encoder_hidden_states": _noise(transformer, batch, tokens, config.joint_attention_dim),
    }


def _places(transformer: Any, side: int, axes: int) -> Tensor:
    """Row and column of every token, as the second and third of ``axes`` numbers."""
    ids = torch.zeros(side // 2, side // 2, axes, device=transformer.device)
    ids[..., 1] += torch.arange(side // 2, device=ids.device)[:, None]
    ids[..., 2] += torch.arange(side // 2, device=ids.device)
    return ids.flatten(0, 1)


def _noise(denoiser: Any, *shape: int) -> Tensor:
    return torch.randn(shape, device=denoiser.device, dtype=denoiser.dtype)
