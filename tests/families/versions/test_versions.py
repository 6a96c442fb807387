"""The sizes of published models: those that diffusers' classes make, and each is told from all others by them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from dreamlora import registry
from dreamlora.lora.file_layers import FileLayer, Shape, adapter_layers
from dreamlora.lora.names import ModelNames, flat
from dreamlora.lora.recognise import Version, format_of, guess_family, versions_of
from dreamlora.lora.recognise import model_of as names_of

_XL = {
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
}
_HIDREAM = {
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": list(range(32)),
    "patch_size": 2,
    "in_channels": 16,
}
_KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
_KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
_SANA_SMALL = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Stable Diffusion 1": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "Stable Diffusion 2": ("UNet2DConditionModel", {"cross_attention_dim": 1024, "use_linear_projection": True}),
    "Stable Diffusion XL": ("UNet2DConditionModel", _XL),
    "FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "Chroma": ("ChromaTransformer2DModel", {}),
    "FLUX.2 dev": ("Flux2Transformer2DModel", {}),
    "FLUX.2 klein 4B": ("Flux2Transformer2DModel", _KLEIN_4B),
    "FLUX.2 klein 9B": ("Flux2Transformer2DModel", _KLEIN_9B),
    "Stable Diffusion 3 medium": ("SD3Transformer2DModel", _SD3),
    "Stable Diffusion 3.5 medium": ("SD3Transformer2DModel", _SD3 | {"dual_attention_layers": tuple(range(13))}),
    "Stable Diffusion 3.5 large": (
        "SD3Transformer2DModel",
        _SD3 | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
    ),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}),
    "HiDream-I1": ("HiDreamImageTransformer2DModel", _HIDREAM),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Lumina Image 2.0": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Krea 2": ("Krea2Transformer2DModel", {}),
    "Sana 1.6B": ("SanaTransformer2DModel", {}),
    "Sana 0.6B": ("SanaTransformer2DModel", _SANA_SMALL),
}
"""As the published config.json have them; what is left out is the default of the class."""
VERSIONS = [
    (family, version)
    for family in registry.names("families.versions")
    if family in registry.names("families.layers")
    for version in versions_of(family)
]
_ATTENTION = re.compile(r"to_[qkv]$|to_out(\.0)?$|add_[qkv]_proj$|to_qkv_mlp_proj$")


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda case: case[1].name)
def case(request) -> tuple[str, Version, dict[str, Shape]]:
    """Family, version, and shapes of the layers that have a name."""
    family, version = request.param
    class_name, config = CONFIGS[version.name]
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config)
    known = names_of(family).layers
    layers = {
        name: tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and known.of_layer(name)
    }
    return family, version, layers


def test_sizes_are_those_of_the_model(case):
    _, version, layers = case
    assert version.layers == len(layers)
    assert set(version.inputs) == {shape[1] for shape in layers.values()}
    found: dict[str, int] = {}
    for name in layers:
        for word, number in pairwise(name.split(".")):
            if number.isdecimal():
                found[word] = max(found.get(word, 0), int(number) + 1)
    assert {word: found[word] for word in version.blocks} == version.blocks
    assert not any(set(version.lacks) & set(name.split(".")) for name in layers)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("part", ["attention", "all"])
def test_each_is_told_from_all_others(case, form, part):
    family, version, layers = case
    names = names_of(family)
    if (form == "kohya" and not names.kohya) or (form == "comfyui" and not names.comfyui):
        pytest.skip("no such files of this family")
    chosen = {name: shape for name, shape in layers.items() if part == "all" or _ATTENTION.search(name)}
    shapes = dict(_shapes(chosen, names, form))
    adapters, others = adapter_layers(shapes)
    assert not others
    assert format_of(shapes) == form
    guess = guess_family(adapters)
    if len(guess.candidates) > 1:  # attention alone is the same in these two
        assert {one.versions[0].name for one in guess.candidates} == {"FLUX.1", "Chroma"}
        assert part == "attention"
        assert guess.certainty == "unsure"
        return
    assert guess.certainty == "certain"
    assert guess.candidates[0].family == family
    more = {"Stable Diffusion 3.5 medium"} if version.name == "Stable Diffusion 3 medium" else set()  # it has all of it
    assert {one.name for one in guess.candidates[0].versions} == {version.name} | more


def _shapes(layers: dict[str, Shape], names: ModelNames, form: str) -> Iterator[tuple[str, Shape]]:
    """Of a LoRA of rank 4; of layers that are one in the original code the first stands for all."""
    down, up = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
    for layer, shape in layers.items():
        place = names.layers.of_layer(layer)
        name = {
            "diffusers": f"{names.denoiser}.{layer}",
            "kohya": "lora_unet_" + flat(layer if names.kohya == "diffusers" else place.name),
            "comfyui": f"diffusion_model.{place.name}",
        }[form]
        yield f"{name}.{down}.weight", (4, *shape[1:])
        yield f"{name}.{up}.weight", (shape[0], 4, *(1 for _ in shape[2:]))


def test_some_blocks_alone_may_be_the_model_s(case):
    family, _, layers = case
    some = {name: shape for name, shape in layers.items() if re.search(r"blocks?\.0\.|layers\.0\.", name)}
    adapters, _ = adapter_layers(dict(_shapes(some, names_of(family), "diffusers")))
    guess = guess_family(adapters)
    assert family in [one.family for one in guess.candidates]


def test_layers_of_no_model_have_no_family():
    shapes = {f"unet.some.layer_{number}.lora_{end}.weight": (4, 4) for number in range(9) for end in "AB"}
    assert guess_family(adapter_layers(shapes)[0]).candidates == ()
    assert guess_family([]) == guess_family(adapter_layers({})[0])


def test_text_encoders_alone_say_which_models_have_them():
    def guess(name: str, width: int) -> list[str]:
        layer = FileLayer("", name, "encoder.layers.0.self_attn.q_proj", "lora", {}, width, width)
        candidates = guess_family([layer]).candidates
        return [version.name for one in candidates for version in one.versions]

    assert "Stable Diffusion 2" in guess("text_encoder", 1024)
    assert "Stable Diffusion 1" not in guess("text_encoder", 1024)
    assert "Stable Diffusion XL" in guess("text_encoder_2", 1280)
    assert "Stable Diffusion 1" not in guess("text_encoder_2", 1280)


def test_a_header_decides_between_families_of_the_same_layers():
    layers = [FileLayer("", "", f"down_blocks.1.resnets.{n}.conv1", "lora", {}, 640, 640) for n in (0, 1)]
    undecided = guess_family(layers)
    assert undecided.certainty == "unsure"
    assert len(undecided.candidates) > 1
    header = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}
    assert [one.family for one in guess_family(layers, header).candidates] == ["sdxl"]
