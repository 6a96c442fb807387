"""Names of Sana: diffusers' alone, as neither ComfyUI nor kohya's trainers have the model.

Source: ComfyUI's ``comfy/supported_models.py`` and kohya's sd-scripts and musubi-tuner, where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, same

_BLOCK = (
    *(f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.conv_inverted", "ff.conv_depth", "ff.conv_point"),
)
_ENDS = (
    *("patch_embed.proj", "time_embed.linear", "proj_out"),
    *("time_embed.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_2"),
    *("caption_projection.linear_1", "caption_projection.linear_2"),
)


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    layers = same(*(f"transformer_blocks.{{}}.{layer}" for layer in _BLOCK), *_ENDS)
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(layers),
        kohya=None,
        comfyui=False,
        architecture="Sana",
    )
