"""Names of Stable Diffusion 3 and 3.5.

Source: diffusers' ``loaders.single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers``, ComfyUI's
``utils.mmdit_to_diffusers``, and kohya's sd-scripts, ``networks/lora_sd3.py`` (``LORA_PREFIX_SD3``,
``LORA_PREFIX_TEXT_ENCODER_CLIP_L``, ``LORA_PREFIX_TEXT_ENCODER_CLIP_G``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed

_BLOCK, _BLOCK_THERE = "transformer_blocks.{}.", "joint_blocks.{}."
_DEPTH = 24
"""Blocks of 3 and of 3.5 medium."""
_RENAMED = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers(int(config.get("num_layers", _DEPTH)))),
        text_encoders={"text_encoder": "te1", "text_encoder_2": "te2"},
        architecture="stable-diffusion-3",
        implementation="https://github.com/Stability-AI/sd3-ref",
        base_version="sd3",
    )


def _layers(depth: int) -> Iterator[Original]:
    yield from renamed(_RENAMED, _BLOCK, _BLOCK_THERE)
    for name, layers in _FUSED.items():
        yield Original(_BLOCK_THERE + name, tuple(_BLOCK + layer for layer in layers))
    yield from renamed(_ENDS)
    # these give a shift and a scale, of diffusers a scale and a shift: the last, and the last block's of the prompt
    yield Original("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)
    last, last_there = _BLOCK.format(depth - 1), _BLOCK_THERE.format(depth - 1)
    yield Original(f"{last_there}context_block.adaLN_modulation.1", (f"{last}norm1_context.linear",), swapped=True)
