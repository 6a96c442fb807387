"""Names of AuraFlow. No trainer of kohya's has it; ComfyUI reads such files, as it does of every model that it has:
"lora_unet_" and the name of a layer.

Source: diffusers' ``loaders.single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers``, and ComfyUI's
``utils.auraflow_to_diffusers`` and ``lora.model_lora_keys_unet``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed

_MLP = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
_ENDS = {
    "pos_embed.proj": "init_x_linear",
    "context_embedder": "cond_seq_linear",
    "time_step_proj.linear_1": "t_embedder.mlp.0",
    "time_step_proj.linear_2": "t_embedder.mlp.2",
    "proj_out": "final_linear",
}


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers()),
        architecture="AuraFlow",
        implementation="https://github.com/cloneofsimo/minRF",
        base_version="auraflow",
    )


def _layers() -> Iterator[Original]:
    joint, joint_there = "joint_transformer_blocks.{}.", "double_layers.{}."
    yield from renamed({"norm1.linear": "modX.1", "norm1_context.linear": "modC.1"}, joint, joint_there)
    yield from _attention(joint, joint_there, "w2", ("to_q", "to_k", "to_v", "to_out.0"))
    yield from _attention(joint, joint_there, "w1", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"))
    yield from renamed(_MLP, f"{joint}ff.", f"{joint_there}mlpX.")
    yield from renamed(_MLP, f"{joint}ff_context.", f"{joint_there}mlpC.")
    single, single_there = "single_transformer_blocks.{}.", "single_layers.{}."
    yield from renamed({"norm1.linear": "modCX.1"}, single, single_there)
    yield from _attention(single, single_there, "w1", ("to_q", "to_k", "to_v", "to_out.0"))
    yield from renamed(_MLP, f"{single}ff.", f"{single_there}mlp.")
    yield from renamed(_ENDS)
    # it gives a shift and a scale, of diffusers a scale and a shift
    yield Original("modF.1", ("norm_out.linear",), swapped=True)


def _attention(before: str, there: str, stream: str, parts: tuple[str, str, str, str]) -> Iterator[Original]:
    """Layers q, k, v and o of a stream."""
    pairs = {part: stream + letter for part, letter in zip(parts, "qkvo", strict=True)}
    return renamed(pairs, f"{before}attn.", f"{there}attn.")
