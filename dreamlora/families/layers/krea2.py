"""Names of Krea 2: the authors' own in ComfyUI and musubi-tuner.

Source: ComfyUI's ``comfy/utils.py`` (``krea2_to_diffusers``); musubi-tuner's ``krea2/krea2_mmdit.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed

_BLOCKS = {
    "transformer_blocks.{}": "blocks.{}",
    "text_fusion.layerwise_blocks.{}": "txtfusion.layerwise_blocks.{}",
    "text_fusion.refiner_blocks.{}": "txtfusion.refiner_blocks.{}",
}
_BLOCK = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
_ENDS = {
    "img_in": "first",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector",
    "final_layer.linear": "last.linear",
}


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers()),
        architecture="Krea-2",
        implementation="https://github.com/krea-ai/krea-2",
        base_version="krea2",
    )


def _layers() -> Iterator[Original]:
    for block, original in _BLOCKS.items():
        yield from renamed(_BLOCK, f"{block}.", f"{original}.")
    yield from renamed(_ENDS)
