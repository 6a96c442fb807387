"""Tables of names against the converters of diffusers, on layers as high as the published models', one column wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, single_file_utils
from torch import Tensor

from dreamlora import registry
from dreamlora.lora.formats import FileContent
from dreamlora.lora.names import NUMBER, LayerPlace, ModelNames
from dreamlora.lora.weights import LayerWeights, lora_weights

WIDTH = 3072
"""Of FLUX.1 and Chroma, which their converters take for granted."""
UNITS = {"lumina2": 96}
"""Rows of a part, where it is not that: of a head of Lumina 2."""
BLOCKS = 2


def model_of(family: str) -> ModelNames:
    model: ModelNames = registry.load("families.layers", family).names({"num_layers": BLOCKS})
    return model


def places(model: ModelNames) -> Iterator[LayerPlace]:
    """Of all original layers, with the first numbers."""
    numbers = [str(number) for number in range(BLOCKS)]
    names = {
        original.name.format(*chosen): None
        for original in model.layers.originals
        for chosen in product(numbers, repeat=original.name.count(NUMBER))
    }
    for name in names:
        place = model.layers.of_name(name)
        assert place and place.name == name
        yield place


def height(family: str, place: LayerPlace) -> int:
    return UNITS.get(family, WIDTH) * (
        2 if place.original.swapped else sum(place.original.rows or [1] * len(place.layers))
    )


class Checkpoint(dict[str, Tensor]):
    """With biases and norms as well."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(7 * WIDTH))


CHECKPOINTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "chroma": single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
    "sd3": single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    "auraflow": single_file_utils.convert_auraflow_transformer_checkpoint_to_diffusers,
    "hidream": single_file_utils.convert_hidream_transformer_to_diffusers,
    "z_image": single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers,
    "lumina2": single_file_utils.convert_lumina2_to_diffusers,
}
NOT_THERE = {
    f"transformer_blocks.{BLOCKS - 1}.{name}"
    for name in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
}
"""In the last block of Stable Diffusion 3, after which the prompt is dropped."""


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_a_checkpoint_of_the_original_names_becomes_that_of_diffusers(family):
    draw = torch.Generator().manual_seed(0)
    found = {place: torch.randn(height(family, place), 1, generator=draw) for place in places(model_of(family))}
    converted = CHECKPOINTS[family](Checkpoint({f"{place.name}.weight": tensor for place, tensor in found.items()}))
    for place, tensor in found.items():
        rows = place.original.rows_of(len(tensor))
        for layer, part in zip(place.layers, tensor.split(rows), strict=True):
            if family == "sd3" and layer in NOT_THERE:
                continue
            expected = torch.cat(part.chunk(2)[::-1]) if place.original.swapped else part
            assert torch.equal(converted[f"{layer}.weight"], expected), layer


LORAS: dict[tuple[str, str], tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], tuple[str, ...]]] = {
    ("kohya", "flux"): (lora_conversion_utils._convert_kohya_flux_lora_to_diffusers, ()),
    ("kohya", "chroma"): (lora_conversion_utils._convert_kohya_flux_lora_to_diffusers, ("distilled_guidance_layer",)),
    ("kohya", "flux2"): (
        lora_conversion_utils._convert_kohya_flux2_lora_to_diffusers,
        ("double_stream_mod", "single_stream_mod", "time_guidance_embed.guidance_embedder", "norm_out"),
    ),
    ("comfyui", "flux2"): (lora_conversion_utils._convert_non_diffusers_flux2_lora_to_diffusers, ("norm_out",)),
    ("comfyui", "hidream"): (lora_conversion_utils._convert_non_diffusers_hidream_lora_to_diffusers, ()),
    ("kohya", "z_image"): (
        lora_conversion_utils._convert_non_diffusers_z_image_lora_to_diffusers,
        ("all_x_embedder", "all_final_layer", "siglip"),
    ),
    ("comfyui", "lumina2"): (
        lora_conversion_utils._convert_non_diffusers_lumina2_lora_to_diffusers,
        ("x_embedder", "time_caption_embed", "norm_out", "context_refiner.0.norm1", "context_refiner.1.norm1"),
    ),
    ("kohya", "qwen_image"): (lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers, ()),
    ("comfyui", "qwen_image"): (lora_conversion_utils._convert_non_diffusers_qwen_lora_to_diffusers, ()),
    ("comfyui", "krea2"): (lora_conversion_utils._convert_non_diffusers_krea2_lora_to_diffusers, ()),
}
"""Converters of diffusers, and how names of layers begin that they do not know, or take for others."""


def drawn(family: str, model: ModelNames, left_out: tuple[str, ...]) -> dict[str, LayerWeights]:
    """A LoRA for every layer, of ranks and alphas that differ."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for place in places(model):
        rows = place.original.rows_of(height(family, place))
        for layer, count in zip(place.layers, rows, strict=True):
            if layer.startswith(left_out):
                continue
            rank = 1 + len(found) % 3
            down, up = torch.randn(rank, 1, generator=draw), torch.randn(count, rank, generator=draw)
            found[layer] = lora_weights(down, up, alpha=rank * [0.5, 1.0, 3.0][len(found) % 3])
    return found


@pytest.mark.parametrize(("form", "family"), LORAS)
def test_diffusers_reads_what_is_written(form, family):
    converter, left_out = LORAS[form, family]
    model = model_of(family)
    weights = drawn(family, model, left_out)
    # FLUX' converter takes alphas of the last layers for 1
    last = {name for name in weights if family in ("flux", "chroma") and name in ("proj_out", "norm_out.linear")}
    weights |= {name: weights[name].with_alpha(float(len(weights[name].down))) for name in last}
    written = registry.load("lora.formats", form).write({model.denoiser: weights}, model).tensors
    converted = {name.removeprefix("transformer."): tensor for name, tensor in converter(dict(written)).items()}
    assert {name.partition(".lora_")[0] for name in converted} == set(weights)
    for layer, adapter in weights.items():
        product = converted[f"{layer}.lora_B.weight"] @ converted[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(product, adapter.delta(), rtol=1e-5, atol=1e-5, msg=layer)


@pytest.mark.parametrize("family", ["flux", "chroma", "flux2"])
def test_diffusers_and_we_read_the_same_in_others_files(family):
    """One A for all that a layer is made of, as kohya writes it."""
    model, converter = model_of(family), LORAS["kohya", family][0]
    draw, tensors = torch.Generator().manual_seed(2), {}
    for name in ("double_blocks_1_img_attn_qkv", "double_blocks_0_txt_attn_qkv", "single_blocks_1_linear1"):
        rows = WIDTH * (7 if "linear1" in name else 3)
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, 1, generator=draw)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=draw)
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    found = registry.load("lora.formats", "kohya").read(FileContent(tensors, {}), model)[model.denoiser]
    converted = {name.removeprefix("transformer."): tensor for name, tensor in converter(dict(tensors)).items()}
    assert {name.partition(".lora_")[0] for name in converted} == set(found)
    for layer, adapter in found.items():
        product = converted[f"{layer}.lora_B.weight"] @ converted[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(adapter.delta(), product)


def test_diffusers_reads_lokrs_of_flux2():
    """All of them by the names of its own layers, of which it takes those in blocks."""
    model, draw = model_of("flux2"), torch.Generator().manual_seed(3)
    weights = {}
    for layer in drawn("flux2", model, LORAS["kohya", "flux2"][1]):
        if "transformer_blocks." in layer:
            shapes = {"lokr_w1": (2, 1), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3)}
            factors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
            weights[layer] = LayerWeights("lokr", factors, alpha=3.0)
    tensors = registry.load("lora.formats", "kohya").write({model.denoiser: weights}, model).tensors
    converted = lora_conversion_utils._convert_lycoris_flux2_lokr_to_diffusers(tensors)
    for layer, adapter in weights.items():
        w1, w2_a, w2_b = (converted.pop(f"transformer.{layer}.{name}") for name in adapter.tensors)
        torch.testing.assert_close(torch.kron(w1, w2_a @ w2_b), adapter.delta(), msg=layer)
    assert not converted
