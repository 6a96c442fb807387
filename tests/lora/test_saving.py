"""What a run writes of its adapters is what its layers compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel

from dreamlora.config import Lora
from dreamlora.families import sd
from dreamlora.lora.formats import FileContent, kohya
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.names import LayerNames, ModelNames, names_of
from dreamlora.lora.pairs import ADAPTER, tuned_layers
from dreamlora.lora.recognise import format_of
from dreamlora.lora.saving import save_lora, weights_of

LORAS = {
    "lora": Lora(rank=3, rank_pattern=("ff", "2", "mid_block", "4"), alpha_pattern=("attn1", "5")),
    "rslora": Lora(rank=3, use_rslora=True, rank_pattern=("ff", "2")),
    "dora": Lora(rank=3, lora_alpha=2.0, adapter="dora"),
    "loha": Lora(rank=3, lora_alpha=2.0, adapter="loha"),
    "loha tucker": Lora(rank=3, adapter="loha", adapter_args=("use_effective_conv2d", "true")),
    "lokr": Lora(rank=2, lora_alpha=3.0, adapter="lokr"),
    "lokr whole": Lora(rank=1000, lora_alpha=300.0, adapter="lokr"),
    "lokr tucker": Lora(
        rank=1, adapter="lokr", adapter_args=("use_effective_conv2d", "true", "decompose_both", "true")
    ),
}
NAMES = ModelNames("unet", LayerNames(()), {"text_encoder": "te"}, kohya="diffusers")


def adapted(folder: Path, lora: Lora) -> dict[str, torch.nn.Module]:
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    add_lora(unet, lora, ["all"], "unet")
    add_lora(text_encoder, lora, sd.TEXT_LORA_LAYERS, "text_encoder")
    draw = torch.Generator().manual_seed(0)
    modules = {"unet": unet, "text_encoder": text_encoder}
    for module in modules.values():
        for parameter in trainable_parameters(module).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return modules


@pytest.mark.parametrize("kind", LORAS)
def test_changes_are_those_of_the_layers(kind: str, sd_folder: Path) -> None:
    modules = adapted(sd_folder, LORAS[kind])
    weights = weights_of(modules)
    for component, module in modules.items():
        layers = list(tuned_layers(module))
        assert [layer.name.removeprefix("text_model.") for layer in layers] == list(weights[component])
        for layer, saved in zip(layers, weights[component].values(), strict=True):
            change = layer.layer.get_delta_weight(ADAPTER)
            torch.testing.assert_close(saved.delta().reshape(change.shape), change, rtol=1e-5, atol=1e-6)
            assert (saved.magnitude is not None) == (kind == "dora")


@pytest.mark.parametrize("kind", [kind for kind in LORAS if kind[:4] in ("loha", "lokr")])
def test_loha_and_lokr_come_back_from_lycoris_files(kind: str, sd_folder: Path, tmp_path: Path) -> None:
    modules = adapted(sd_folder, LORAS[kind])
    names = names_of(sd, dict(modules["unet"].config))
    tensors = load_file(save_lora(tmp_path, modules, names=names))
    assert format_of(tensors) == "kohya"
    assert all(key.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for key in tensors)
    again = kohya.read(FileContent(tensors, {}), names)
    for component, layers in weights_of(modules).items():
        assert layers.keys() == again[component].keys()
        for name, layer in layers.items():
            torch.testing.assert_close(again[component][name].delta(), layer.delta(), rtol=1e-5, atol=1e-6)


def test_models_that_other_programs_do_not_have_get_diffusers_names(sd_folder: Path, tmp_path: Path) -> None:
    unet = adapted(sd_folder, LORAS["lokr"])["unet"]
    tensors = load_file(save_lora(tmp_path, {"unet": unet}, names=ModelNames("unet", LayerNames(()), kohya=None)))
    assert all(key.startswith("lycoris_") for key in tensors)
    assert "lycoris_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lokr_w1" in tensors


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_stock_diffusers_loads_the_same(kind: str, sd_folder: Path, tmp_path: Path) -> None:
    modules = adapted(sd_folder, LORAS[kind])
    file = save_lora(tmp_path, modules, names=NAMES)
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    for component, module in modules.items():
        loaded = getattr(pipeline, component)
        own = {layer.name: layer.layer for layer in tuned_layers(module)}
        for name, layer in own.items():
            there = loaded.get_submodule(name)
            [adapter] = there.scaling
            assert there.scaling[adapter] == pytest.approx(layer.scaling[ADAPTER])
            assert torch.equal(there.lora_A[adapter].weight, layer.lora_A[ADAPTER].weight)
            assert torch.equal(there.lora_B[adapter].weight, layer.lora_B[ADAPTER].weight)
            if kind == "dora":
                lengths = (x.lora_magnitude_vector[y].weight for x, y in ((there, adapter), (layer, ADAPTER)))
                assert torch.equal(*lengths)
    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    ends = settings.get("unet.rank_pattern", {})
    assert ends == {"rslora": {"net.2": 2, "proj": 2}, "dora": {}}.get(kind, ends)
