"""Names of Z-Image: q, k and v are one layer in ComfyUI, which has the model as a Lumina; musubi-tuner has diffusers'.

kohya's files get ComfyUI's names, as ComfyUI and diffusers read these; both are read.

Source: ComfyUI's ``comfy/utils.py`` (``z_image_to_diffusers``), and diffusers'
``convert_z_image_transformer_checkpoint_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed, same

_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}", "siglip_refiner.{}")
_EMBEDDERS = ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "siglip_embedder.1")
_ENDS = {
    "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.linear": "final_layer.linear",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}
"""Of the one patch size that was published."""


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers()),
        architecture="Z-Image",
        implementation="https://github.com/Tongyi-MAI/Z-Image",
        base_version="z_image",
    )


def _layers() -> Iterator[Original]:
    for block in _BLOCKS:
        attention = f"{block}.attention"
        yield Original(f"{attention}.qkv", tuple(f"{attention}.to_{part}" for part in "qkv"))
        yield Original(f"{attention}.out", (f"{attention}.to_out.0",))
        yield from same(*(f"{block}.feed_forward.w{number}" for number in (1, 2, 3)), f"{block}.adaLN_modulation.0")
    yield from same(*_EMBEDDERS)
    yield from renamed(_ENDS)
