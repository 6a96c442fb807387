"""The layers that a file has adapters or weights for, by the names and shapes of its tensors alone. No torch here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from dreamlora.lora.part_names import by_layer

Shape = tuple[int, ...]
Kind = Literal["lora", "loha", "lokr", "weight"]

WRAPPER = "base_model.model."
"""Before names in PEFT's files."""
COMFYUI = "diffusion_model."
_TEXT = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "text_encoder/": "text_encoder",
    "text_encoder_2/": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
"""Components by what programs put before the names of their layers."""
_OF_DENOISER = (
    *("lora_unet_", "lora_transformer_", "lycoris_"),
    *("unet.", "transformer.", "unet/", "transformer/", "model.diffusion_model.", COMFYUI),
)
_CLIP_MODEL = re.compile(r"^text_model[._]")
_OTHERWISE = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(double_blocks\.\d+)\.processor\.(qkv|proj)_lora1$", r"\1.img_attn.\2"),
        (r"^(double_blocks\.\d+)\.processor\.(qkv|proj)_lora2$", r"\1.txt_attn.\2"),
        (r"^(single_blocks\.\d+)\.processor\.qkv_lora$", r"\1.linear1"),
        (r"^(single_blocks\.\d+)\.processor\.proj_lora$", r"\1.linear2"),
        (r"\.processor\.(to_[qkv])_lora$", r".\1"),
        (r"\.processor\.to_out_lora$", r".to_out.0"),
    )
]
"""Names of xlabs, and of diffusers before PEFT, and what they stand for."""
_EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param"}
_WIDTHS = (768, 1024, 1280, 2048, 4096)
"""Of text encoders' vectors of words."""
_MOST_WORDS = 16
_OF_CHECKPOINTS = {
    "denoiser": ("model.diffusion_model.",),
    "text encoders": ("cond_stage_model.", "conditioner.", "text_encoders."),
    "autoencoder": ("first_stage_model.", "vae."),
}


@dataclass(frozen=True)
class FileLayer:
    """A layer that a file has an adapter or a weight for.

    Attributes:
        name: as the file has it, with the component's.
        component: "text_encoder", ...; "": the denoiser.
        layer: its name without the component's.
        kind: of the adapter; "weight": it is the layer's own weight.
        parts: names of tensors, by PEFT's and LyCORIS' names of the factors, "alpha", "magnitude", "lora_mid".
        rows, columns: of the layer's weight ``(rows, columns, ...)``; 0: not known.
    """

    name: str
    component: str
    layer: str
    kind: Kind
    parts: Mapping[str, str]
    rows: int
    columns: int


def adapter_layers(shapes: Mapping[str, Shape]) -> tuple[list[FileLayer], list[str]]:
    """Layers that have an adapter in a file, and names of tensors that are no part of one.

    Args:
        shapes: of all tensors.
    """
    found, others = by_layer(shapes)
    layers = []
    for name, parts in found.items():
        kind = _kind_of(parts)
        if kind is None:
            others.extend(parts.values())
            continue
        component, layer = _component_of(_plain(name))
        rows, columns = _sides({part: shapes[tensor] for part, tensor in parts.items()})
        layers.append(FileLayer(name, component, layer, kind, parts, rows, columns))
    return layers, others


def weight_layers(shapes: Mapping[str, Shape]) -> list[FileLayer]:
    """Layers whose own weights are in a file.

    Args:
        shapes: of all tensors; of whole models only those of the denoiser count.
    """
    layers = []
    others = tuple(prefix for part, prefixes in _OF_CHECKPOINTS.items() if part != "denoiser" for prefix in prefixes)
    (denoiser,) = _OF_CHECKPOINTS["denoiser"]
    whole = any(name.startswith(denoiser) for name in shapes)
    for name, shape in shapes.items():
        if name.startswith(others) or (whole and not name.startswith(denoiser)):
            continue
        if name.endswith(".weight") and len(shape) > 1:
            component, layer = _component_of(name.removesuffix(".weight"))
            layers.append(FileLayer(name, component, layer, "weight", {"weight": name}, shape[0], shape[1]))
    return layers


def _component_of(name: str) -> tuple[str, str]:
    for prefix, component in _TEXT.items():
        if name.startswith(prefix):
            return component, _CLIP_MODEL.sub("", name.removeprefix(prefix).removeprefix(WRAPPER))
    for prefix in _OF_DENOISER:
        name = name.removeprefix(prefix)
    return "", name.removeprefix(WRAPPER)


def _plain(layer: str) -> str:
    """The name of a layer that xlabs, or diffusers before PEFT, have named otherwise."""
    for pattern, name in _OTHERWISE:
        layer = pattern.sub(name, layer)
    return layer


def _kind_of(parts: Collection[str]) -> Kind | None:
    if {"lora_A", "lora_B"} <= set(parts):
        return "lora"
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= set(parts):
        return "loha"
    halves = ("lokr_w1", "lokr_w2")
    whole = all(half in parts or {f"{half}_a", f"{half}_b"} <= set(parts) for half in halves)
    return "lokr" if whole else None


def _sides(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Rows and columns of the layer's weight; 0 where a factor is no matrix."""
    if any(len(shape) < 2 for part, shape in shapes.items() if part not in ("alpha", "magnitude")):
        return 0, 0
    if "lora_A" in shapes:
        return shapes["lora_B"][0], shapes["lora_A"][1]
    if "hada_w1_a" in shapes:
        return shapes["hada_w1_a"][1 if "hada_t1" in shapes else 0], shapes["hada_w1_b"][1]
    (a, b), (c, d) = (_half(shapes, half) for half in ("lokr_w1", "lokr_w2"))
    return a * c, b * d


def _half(shapes: Mapping[str, Shape], name: str) -> tuple[int, int]:
    if name in shapes:
        return shapes[name][0], shapes[name][1]
    core = name == "lokr_w2" and "lokr_t2" in shapes
    return shapes[f"{name}_a"][1 if core else 0], shapes[f"{name}_b"][1]


def holds_embeddings(shapes: Mapping[str, Shape]) -> bool:
    """Whether a file holds vectors of new words (textual inversion) and nothing else.

    Args:
        shapes: of all tensors.
    """
    vectors = all(0 < len(shape) < 3 and shape[-1] in _WIDTHS for shape in shapes.values())
    named = shapes.keys() <= _EMBEDDINGS or (len(shapes) <= _MOST_WORDS and not any("." in name for name in shapes))
    return bool(shapes) and vectors and named


def parts_of_model(names: Collection[str]) -> tuple[str, ...]:
    """What a file of a model's own weights holds, in words: "denoiser", "text encoders", "autoencoder"."""
    found = {part: [name for name in names if name.startswith(prefixes)] for part, prefixes in _OF_CHECKPOINTS.items()}
    rest = len(names) - sum(map(len, found.values()))
    return tuple(part for part, mine in found.items() if mine or (part == "denoiser" and rest))
