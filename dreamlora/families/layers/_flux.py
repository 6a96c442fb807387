"""Layers of FLUX' transformers, which Chroma and FLUX.2 share, and their names in Black Forest Labs' code.

Source: diffusers' ``loaders.single_file_utils.convert_flux_transformer_checkpoint_to_diffusers``, and ComfyUI's
``utils.flux_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator

from dreamlora.lora.names import Original, renamed

_DOUBLE, _DOUBLE_THERE = "transformer_blocks.{}.", "double_blocks.{}."
_SINGLE, _SINGLE_THERE = "single_transformer_blocks.{}.", "single_blocks.{}."

ENDS = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
NORM_OUT = Original("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)
"""It gives a shift and a scale, of diffusers a scale and a shift."""


def double_blocks(mlp_in: str, mlp_out: str) -> Iterator[Original]:
    """Attention and MLPs of the blocks of two streams.

    Args:
        mlp_in, mlp_out: the two layers of an MLP in diffusers: "net.0.proj", "net.2".
    """
    yield _fused("img_attn.qkv", "to_q", "to_k", "to_v")
    yield _fused("txt_attn.qkv", "add_q_proj", "add_k_proj", "add_v_proj")
    yield from renamed(
        {
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            f"ff.{mlp_in}": "img_mlp.0",
            f"ff.{mlp_out}": "img_mlp.2",
            f"ff_context.{mlp_in}": "txt_mlp.0",
            f"ff_context.{mlp_out}": "txt_mlp.2",
        },
        _DOUBLE,
        _DOUBLE_THERE,
    )


def _fused(name: str, *parts: str) -> Original:
    return Original(_DOUBLE_THERE + name, tuple(f"{_DOUBLE}attn.{part}" for part in parts))


def single_blocks() -> Iterator[Original]:
    """Attention and MLP of FLUX.1's and Chroma's blocks of one stream; an MLP is four times as wide."""
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    yield Original(f"{_SINGLE_THERE}linear1", tuple(_SINGLE + part for part in parts), rows=(1, 1, 1, 4))
    yield from renamed({"proj_out": "linear2"}, _SINGLE, _SINGLE_THERE)


def fused_single_blocks() -> Iterator[Original]:
    """The same of FLUX.2, where diffusers has left them as they were."""
    return renamed({"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}, _SINGLE, _SINGLE_THERE)


def modulations() -> Iterator[Original]:
    """FLUX.1's, one for every block and stream."""
    yield from renamed({"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}, _DOUBLE, _DOUBLE_THERE)
    yield from renamed({"norm.linear": "modulation.lin"}, _SINGLE, _SINGLE_THERE)


def embedders(parts: dict[str, str]) -> Iterator[Original]:
    """MLPs of what is not an image.

    Args:
        parts: original name by diffusers': "time_in" by "time_text_embed.timestep_embedder".
    """
    for part, name in parts.items():
        yield from renamed({"linear_1": "in_layer", "linear_2": "out_layer"}, f"{part}.", f"{name}.")
