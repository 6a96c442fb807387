"""Names of HiDream-I1, which are its authors' in diffusers too. No trainer of kohya's has it; ComfyUI reads such files,
as it does of every model that it has: "lora_unet_" and the name of a layer.

Source: diffusers' ``loaders.single_file_utils.convert_hidream_transformer_to_diffusers`` and
``loaders.lora_conversion_utils._convert_non_diffusers_hidream_lora_to_diffusers``, neither of which changes a name, and
ComfyUI's ``lora.model_lora_keys_unet``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, same

_ATTENTION = ("to_q", "to_k", "to_v", "to_out")
_ENDS = (
    *(f"t_embedder.timestep_embedder.linear_{number}" for number in (1, 2)),
    *(f"p_embedder.pooled_embedder.linear_{number}" for number in (1, 2)),
    *("x_embedder.proj", "caption_projection.{}.linear", "final_layer.linear", "final_layer.adaLN_modulation.1"),
)


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(same(*_layers())),
        architecture="HiDream-I1",
        implementation="https://github.com/HiDream-ai/HiDream-I1",
        base_version="hidream",
    )


def _layers() -> Iterator[str]:
    for kind in ("double_stream_blocks", "single_stream_blocks"):
        block = f"{kind}.{{}}.block."
        yield f"{block}adaLN_modulation.1"
        yield from (f"{block}attn1.{part}" for part in _ATTENTION)
        yield from _mlp(f"{block}ff_i.shared_experts.")
        yield from _mlp(f"{block}ff_i.experts.{{}}.")
    block = "double_stream_blocks.{}.block."
    yield from (f"{block}attn1.{part}_t" for part in _ATTENTION)
    yield from _mlp(f"{block}ff_t.")
    yield from _ENDS


def _mlp(before: str) -> Iterator[str]:
    return (before + part for part in ("w1", "w2", "w3"))
