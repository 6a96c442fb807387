"""Every family's table of names: complete, one to one, and with what other programs read from it the same image."""

from __future__ import annotations

import copy
import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.lora.formats import peft
from dreamlora.lora.names import CLIP, LayerNames, ModelNames
from dreamlora.lora.peft_folder import write_peft
from dreamlora.lora.recognise import format_of
from dreamlora.lora.saving import save_content
from dreamlora.lora.weights import AdapterWeights, lora_weights
from tests import tinymodels

FORMATS = ("kohya", "comfyui", "peft")
_AS_OTHERS = {"qwen_image-edit", "qwen_image-edit_plus"}
"""Pipelines that make a megapixel of any image, around a denoiser that is another's too."""
MODELS = [
    name
    for name in tinymodels.SAVERS
    if name.partition("-")[0] in registry.names("families.layers") and name not in _AS_OTHERS
]
LOADED: dict[str, set[str]] = {
    "kohya": {"sd", "sdxl", "flux", "chroma", "flux2", "qwen_image", "z_image"},
    "comfyui": {"flux2", "hidream", "qwen_image", "krea2"},
    "peft": set(),
}
"""Families whose stock pipeline reads files of a format."""
_DOUBLE_BLOCKS = r"transformer_blocks\."
LOADED_LAYERS: dict[tuple[str, str], str] = {
    # others have hard-coded widths, or lose their component's name
    ("kohya", "flux"): _DOUBLE_BLOCKS,
    ("kohya", "chroma"): _DOUBLE_BLOCKS,
    ("kohya", "flux2"): r"(single_)?transformer_blocks|x_embedder|context_embedder|.*timestep_embedder|proj_out",
    # the original names of the layers around the blocks are not known there
    ("kohya", "z_image"): r"layers|(noise|context)_refiner|t_embedder|cap_embedder",
    # norm_out's halves do not change places there
    ("comfyui", "flux2"): r"(?!norm_out)",
}
"""How names of layers begin that it reads, if not all."""


@pytest.fixture(scope="module", params=MODELS)
def case(request, tiny_folder) -> SimpleNamespace:
    tiny, folder = tinymodels.of(request.param), tiny_folder(request.param)
    family = request.param.partition("-")[0]
    stock = tiny.stock(folder, **({"safety_checker": None} if family == "sd" else {}))
    stock.set_progress_bar_config(disable=True)
    model: ModelNames = registry.load("families.layers", family).names(_config(stock, family))
    return SimpleNamespace(name=family, tiny=tiny, stock=stock, model=model)


def _config(stock: Any, family: str) -> dict[str, Any]:
    denoiser = registry.load("families", family).DENOISER
    return dict(getattr(stock, denoiser).config)


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def drawn(module: nn.Module, names: LayerNames, seed: int = 0) -> dict[str, Any]:
    """A LoRA for all layers that have a name, of ranks and alphas that differ."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for number, (name, layer) in enumerate(adaptable(module).items()):
        name = name.removeprefix("text_model.")
        if not names.of_layer(name) or getattr(layer, "groups", 1) > 1:  # which PEFT adapts at few ranks
            continue
        rank, shape = 1 + number % 3, tuple(layer.weight.shape)
        down = torch.randn(rank, *shape[1:], generator=draw) * 0.3
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=draw) * 0.3
        weights[name] = lora_weights(down, up, alpha=[1.0, 2.5, 4.0][number % 3])
    return weights


def all_weights(case) -> AdapterWeights:
    weights: AdapterWeights = {case.model.denoiser: drawn(getattr(case.stock, case.model.denoiser), case.model.layers)}
    for component in case.model.text_encoders:
        weights[component] = drawn(getattr(case.stock, component), CLIP, seed=1)
    return weights


def test_every_layer_in_a_block_has_a_name(case):
    layers = adaptable(getattr(case.stock, case.model.denoiser))
    inner = [name for name in layers if any(part.isdecimal() for part in name.split("."))]
    assert [name for name in inner if case.model.layers.of_layer(name) is None] == []
    for component in case.model.text_encoders:
        names = [name.removeprefix("text_model.") for name in adaptable(getattr(case.stock, component))]
        assert all(CLIP.of_layer(name) for name in names), names


def test_names_stand_for_one_layer_each(case):
    """Also without points, where some of two words could be one."""
    layers = adaptable(getattr(case.stock, case.model.denoiser))
    places = {name: place for name in layers if (place := case.model.layers.of_layer(name))}
    ends = [(place.name, place.part) for place in places.values()]
    assert len(set(ends)) == len(ends)
    for name, place in places.items():
        assert place.layers[place.part] == name
        assert case.model.layers.of_name(place.name).layers == place.layers
        assert case.model.layers.of_flat_name(place.name.replace(".", "_")).layers == place.layers
        assert case.model.layers.of_flat_layer(name.replace(".", "_")).layers[place.part] == name


def test_parts_of_a_layer_have_their_rows(case):
    layers = adaptable(getattr(case.stock, case.model.denoiser))
    for name in layers:
        place = case.model.layers.of_layer(name)
        if place and len(place.layers) > 1:
            rows = [layers[part].weight.shape[0] for part in place.layers]
            assert place.original.rows_of(sum(rows)) == rows, name


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read_back(case, form):
    module, weights = registry.load("lora.formats", form), all_weights(case)
    if not can_write(case, form):
        with pytest.raises(ValueError, match=r"has this model|does not have this model"):
            module.write(weights, case.model)
        return
    content = module.write(weights, case.model)
    assert format_of(content.tensors) == form
    found = module.read(content, case.model)
    assert found.keys() == weights.keys()
    for component, adapters in weights.items():
        assert found[component].keys() == adapters.keys()
        for layer, adapter in adapters.items():
            torch.testing.assert_close(found[component][layer].delta(), adapter.delta(), rtol=1e-5, atol=1e-6)


def can_write(case, form: str) -> bool:
    return not case.model.lacking(form)


@pytest.mark.parametrize("form", ["diffusers", *FORMATS])
def test_stock_pipeline_draws_the_same_image(case, form, tmp_path):
    """As with each layer's ΔW added to its weight."""
    if form in LOADED and case.name not in LOADED[form]:
        pytest.skip("diffusers reads no such files of this family")
    weights = all_weights(case)
    if begin := LOADED_LAYERS.get((form, case.name)):
        layers = weights[case.model.denoiser].items()
        weights[case.model.denoiser] = {name: adapter for name, adapter in layers if re.match(begin, name)}
    content = registry.load("lora.formats", form).write(weights, case.model)
    file = save_content(tmp_path / "lora.safetensors", content)
    loaded = copy.deepcopy(case.stock)
    loaded.load_lora_weights(file)
    expected = image(case, merged(case, weights))
    torch.testing.assert_close(image(case, loaded), expected, rtol=0, atol=1e-4)
    assert (expected - image(case, case.stock)).abs().max() > 1e-3


def test_peft_itself_loads_its_folder_onto_the_bare_denoiser(case, tmp_path):
    weights = all_weights(case)
    write_peft(tmp_path / "lora", peft.write(weights, case.model))
    loaded = copy.deepcopy(case.stock)
    denoiser = getattr(loaded, case.model.denoiser)
    PeftModel.from_pretrained(denoiser, tmp_path / "lora")  # which puts the layers into it
    adapted = {name for name, layer in denoiser.named_modules() if hasattr(layer, "lora_A")}
    assert adapted == weights[case.model.denoiser].keys()
    expected = image(case, merged(case, {case.model.denoiser: weights[case.model.denoiser]}))
    torch.testing.assert_close(image(case, loaded), expected, rtol=0, atol=1e-4)


def merged(case, weights: AdapterWeights) -> Any:
    stock = copy.deepcopy(case.stock)
    for component, adapters in weights.items():
        module = getattr(stock, component)
        for name, layer in adaptable(module).items():
            adapter = adapters.get(name.removeprefix("text_model."))
            if adapter:
                layer.weight.data += adapter.delta().reshape(layer.weight.shape)
    return stock


@torch.no_grad()
def image(case, pipeline: Any) -> Tensor:
    side = case.tiny.side
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", **case.tiny.call}
    takes = inspect.signature(pipeline.__call__).parameters
    if "use_resolution_binning" in takes:
        options["use_resolution_binning"] = False
    if "max_area" in takes:
        options |= {"max_area": side * side, "_auto_resize": False}
    if case.tiny.edited:
        options["image"] = case.tiny.edited
    case.tiny.prepare(pipeline, side, side)
    draw = torch.Generator().manual_seed(5)
    return case.tiny.mended(pipeline)(prompt="a cat", height=side, width=side, generator=draw, **options).images
