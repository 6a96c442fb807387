"""Names of Lumina Image 2.0: q, k and v are one layer in the original code, and k and v have fewer heads than q.

Source: kohya's sd-scripts, ``library/lumina_models.py`` and ``networks/lora_lumina.py``; ComfyUI's
``comfy/ldm/lumina/model.py``; diffusers' ``convert_lumina2_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed, same

_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
_BLOCK = {
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "norm1.linear": "adaLN_modulation.1",
}
_ENDS = {
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_caption_embed.caption_embedder.1": "cap_embedder.1",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_HEADS, _SHARED_HEADS = 24, 8


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers(config)),
        architecture="lumina-2",
        implementation="https://github.com/Alpha-VLLM/Lumina-Image-2.0",
        base_version="lumina2",
    )


def _layers(config: Mapping[str, Any]) -> Iterator[Original]:
    heads = int(config.get("num_attention_heads") or _HEADS)
    shared = int(config.get("num_kv_heads") or _SHARED_HEADS)
    for block in _BLOCKS:
        yield Original(
            f"{block}.attention.qkv",
            tuple(f"{block}.attn.to_{part}" for part in "qkv"),
            rows=(heads, shared, shared),
        )
        yield from renamed(_BLOCK, f"{block}.", f"{block}.")
    yield from same("x_embedder")
    yield from renamed(_ENDS)
