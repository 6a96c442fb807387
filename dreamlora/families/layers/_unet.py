"""Layers of Stable Diffusion's UNets, and their names in the original code (``ldm``, ``sgm``).

Source: diffusers' ``loaders.single_file_utils.convert_ldm_unet_checkpoint``, and ComfyUI's ``utils.unet_to_diffusers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.lora.names import Original, renamed

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = (
    *("proj_in", "proj_out"),
    *(
        f"transformer_blocks.{{}}.{name}"
        for name in (
            *(f"attn{number}.{part}" for number in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
            *("ff.net.0.proj", "ff.net.2"),
        )
    ),
)
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def layers(config: Mapping[str, Any]) -> Iterator[Original]:
    """All that a UNet can have; which of its blocks have attention does not matter here.

    Args:
        config: with ``layers_per_block`` (2 in all that were published) and ``block_out_channels``.
    """
    levels = len(config.get("block_out_channels", range(4)))
    depth = int(config.get("layers_per_block", 2))
    yield from renamed(_ENDS)
    for level in range(levels):
        first = level * (depth + 1)
        for layer in range(depth):
            down, name = f"down_blocks.{level}", f"input_blocks.{first + layer + 1}"
            yield from _block(f"{down}.resnets.{layer}", f"{down}.attentions.{layer}", name)
        yield from renamed(
            {"downsamplers.0.conv": "0.op"}, f"down_blocks.{level}.", f"input_blocks.{first + depth + 1}."
        )
        for layer in range(depth + 1):
            up, name = f"up_blocks.{level}", f"output_blocks.{first + layer}"
            yield from _block(f"{up}.resnets.{layer}", f"{up}.attentions.{layer}", name)
        # it comes after the block's attention, where there is one
        place = 2 if _attends(config, level) else 1
        yield from renamed(
            {"upsamplers.0.conv": f"{place}.conv"}, f"up_blocks.{level}.", f"output_blocks.{first + depth}."
        )
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield from _attention("mid_block.attentions.0", "middle_block.1")
    yield from _resnet("mid_block.resnets.1", "middle_block.2")


def _block(resnet: str, attention: str, name: str) -> Iterator[Original]:
    yield from _resnet(resnet, f"{name}.0")
    yield from _attention(attention, f"{name}.1")


def _resnet(layer: str, name: str) -> Iterator[Original]:
    return renamed(_RESNET, f"{layer}.", f"{name}.")


def _attention(layer: str, name: str) -> Iterator[Original]:
    return renamed({part: part for part in _ATTENTION}, f"{layer}.", f"{name}.")


def _attends(config: Mapping[str, Any], level: int) -> bool:
    """Whether an up block has attention: of the published ones not the first of SD, and not the last of SDXL."""
    kinds = config["up_block_types"]
    return "Attn" in str(kinds[level]) if level < len(kinds) else False
