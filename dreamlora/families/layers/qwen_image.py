"""Names of Qwen-Image and Qwen-Image-Edit: everybody has diffusers'.

Source: musubi-tuner's ``convert_lora.py`` (``QWEN_IMAGE_KEYS``), and ComfyUI's ``comfy/lora.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, same

_BLOCK = (
    *("img_mod.1", "txt_mod.1"),
    *(f"attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2")),
)
_ENDS = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
)


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    layers = same(*(f"transformer_blocks.{{}}.{layer}" for layer in _BLOCK), *_ENDS)
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(layers),
        kohya="diffusers",
        architecture="Qwen-Image",
        implementation="https://github.com/QwenLM/Qwen-Image",
        base_version="qwen_image",
    )
