"""PEFT's folders: PEFT itself loads what is written, and what it writes is read."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dreamlora.errors import UserError
from dreamlora.families.layers import sdxl
from dreamlora.lora.files import read_weights
from dreamlora.lora.formats import FileContent, peft
from dreamlora.lora.peft_folder import write_peft
from dreamlora.lora.weights import LayerWeights, lora_weights

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
MODEL = sdxl.names(CONFIG)
MODULES = ["to_q", "to_v", "conv1", "proj_in", "time_emb_proj"]
DRAWS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, init_lora_weights=False),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*MODULES, "conv_in", "conv_out"],
        init_lora_weights=False,
        rank_pattern={"attn2.to_q": 2, "conv_in": 3},
        alpha_pattern={"attn1.to_v": 1.5, "conv_in": 7},
    ),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, init_lora_weights=False, use_rslora=True),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, init_lora_weights=False, use_dora=True),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=MODULES, init_weights=False),
    "loha of convolutions": LoHaConfig(
        r=4, alpha=6, target_modules=MODULES, init_weights=False, use_effective_conv2d=True
    ),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=MODULES, init_weights=False),
    "lokr of parts": LoKrConfig(
        r=1, alpha=3, target_modules=MODULES, init_weights=False, decompose_both=True, decompose_factor=4
    ),
    "lokr of whole matrices": LoKrConfig(r=64, alpha=32, target_modules=MODULES, init_weights=False),
}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**CONFIG).eval()


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    sample, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 3, 16, generator=draw)
    return module(sample, 7, encoder_hidden_states=text).sample


def merged(module: nn.Module, adapters: dict[str, LayerWeights]) -> nn.Module:
    result = copy.deepcopy(module)
    for name, adapter in adapters.items():
        layer = result.get_submodule(name)
        weight = layer.weight.data + adapter.delta().reshape(layer.weight.shape)
        if adapter.magnitude is not None:
            sides = (-1, *(1 for _ in weight.shape[1:]))
            weight = weight / weight.flatten(1).norm(dim=1).reshape(sides) * adapter.magnitude.reshape(sides)
        layer.weight.data = weight
    return result


@pytest.mark.parametrize("kind", DRAWS)
def test_pefts_own_folder_is_read_and_written_as_it_is(unet, kind, tmp_path):
    own = get_peft_model(copy.deepcopy(unet), copy.deepcopy(DRAWS[kind])).eval()
    if kind == "dora":
        for name, parameter in own.named_parameters():
            parameter.data *= 1.5 if "magnitude" in name else 1.0
    own.save_pretrained(tmp_path / "theirs")
    expected = output(own)
    assert (expected - output(unet)).abs().max() > 1e-3

    adapters = read_weights(tmp_path / "theirs", MODEL)
    torch.testing.assert_close(output(merged(unet, adapters["unet"])), expected, rtol=1e-4, atol=1e-4)

    write_peft(tmp_path / "ours", peft.write(adapters, MODEL))
    loaded = PeftModel.from_pretrained(copy.deepcopy(unet), tmp_path / "ours").eval()
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-4)


def pair(module: nn.Module, rank: int, alpha: float) -> LayerWeights:
    rows, columns, *sides = module.weight.shape
    up = torch.randn(rows, rank, *(1 for _ in sides))
    return lora_weights(torch.randn(rank, columns, *sides) * 0.2, up * 0.2, alpha)


def test_a_layer_whose_name_others_end_with_has_its_own_rank(tmp_path):
    """PEFT takes a name for the end of names."""
    module = nn.ModuleDict({"proj": nn.Linear(4, 4), "block": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    for name in ("proj", "block.proj"):
        weights = {name: pair(module.get_submodule(name), 2, 3.0)}
        if name == "proj":
            weights["block.proj"] = pair(module["block"]["proj"], 1, 1.0)
        write_peft(tmp_path / name, peft.write({"unet": weights}))
        loaded = PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / name)
        found = {each for each, layer in loaded.base_model.model.named_modules() if hasattr(layer, "lora_A")}
        assert found == weights.keys()
        for layer, adapter in weights.items():
            theirs = loaded.base_model.model.get_submodule(layer).get_delta_weight("default")
            torch.testing.assert_close(theirs, adapter.delta())


def text_encoder(kind: Any) -> nn.Module:
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(kind.config_class(**config, vocab_size=50, projection_dim=8)).eval()


def test_text_encoders_are_in_folders_of_their_own(unet, tmp_path):
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    modules = {name: text_encoder(kind) for name, kind in encoders.items()}
    weights = {"unet": {"mid_block.resnets.0.conv1": pair(unet.mid_block.resnets[0].conv1, 2, 3.0)}}
    for component, module in modules.items():
        layers = {name.removeprefix("text_model."): layer for name, layer in module.named_modules()}
        weights[component] = {name: pair(layers[name], 2, 3.0) for name in layers if name.endswith(("q_proj", "fc1"))}
    write_peft(tmp_path, peft.write(weights, MODEL))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        *encoders,
    ]
    found = read_weights(tmp_path, MODEL)
    assert found.keys() == weights.keys()
    for component, module in modules.items():
        assert found[component].keys() == weights[component].keys()
        tokens = torch.tensor([[3, 4, 49]])
        before = module(tokens)[0]
        loaded = PeftModel.from_pretrained(copy.deepcopy(module), tmp_path / component).eval()
        inner = loaded.base_model.model
        for layer, adapter in weights[component].items():
            name = layer if hasattr(inner, "encoder") else f"text_model.{layer}"
            torch.testing.assert_close(inner.get_submodule(name).get_delta_weight("default"), adapter.delta())
        assert (loaded(tokens)[0] - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"peft_type": "OFT"}, "no kind of adapter that is known here"),
        ({"r": 10**9}, "unet.r"),
        ({"r": 3}, "rank 3"),
        ({"rank_pattern": {"(a|a)*$": 3}}, "regular expression"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"use_dora": True}, "do not agree"),
        ({"peft_type": "LOHA"}, "is of a loha"),
        ({"lora_alpha": "much"}, "unet.lora_alpha"),
    ],
)
def test_settings_that_do_not_fit_are_named(unet, changed, words, tmp_path):
    layer = "mid_block.resnets.0.conv1"
    write_peft(tmp_path, peft.write({"unet": {layer: pair(unet.get_submodule(layer), 2, 3.0)}}))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_weights(tmp_path, MODEL)


@pytest.mark.parametrize("text", ["[]", "{", "[" * 10**5, '{"a": "' + "x" * 2**21 + '"}', "\udce9"])
def test_a_config_that_is_none(unet, text, tmp_path):
    layer = "mid_block.resnets.0.conv1"
    write_peft(tmp_path, peft.write({"unet": {layer: pair(unet.get_submodule(layer), 2, 3.0)}}))
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError):
        read_weights(tmp_path, MODEL)


def test_regular_expressions_for_layers_are_not_run(unet, tmp_path):
    layer = "mid_block.resnets.0.conv1"
    weights = {layer: pair(unet.get_submodule(layer), 2, 3.0)}
    write_peft(tmp_path, peft.write({"unet": weights}))
    config = tmp_path / "adapter_config.json"
    found = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(found | {"target_modules": "(a*)*" * 30 + "b"}), encoding="utf-8")
    assert read_weights(tmp_path, MODEL)["unet"].keys() == weights.keys()


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        read_weights(tmp_path, MODEL)


def test_a_file_alone_has_its_ranks_as_alphas(unet):
    layer = "mid_block.resnets.0.conv1"
    written = peft.write({"unet": {layer: pair(unet.get_submodule(layer), 2, 3.0)}})
    assert peft.read(FileContent(written.tensors, {}), MODEL)["unet"][layer].alpha == 2


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"a": ("lora", True), "b": ("lora", False)}, "DoRA"),
        ({"a": ("lora", False), "b": ("loha", False)}, "several kinds"),
        ({"a": ("lokr", False)}, "LoKr of other sizes"),
    ],
)
def test_what_a_folder_cannot_hold_is_said(layers, words):
    makers = {
        "lora": lambda: {"lora_A": torch.ones(1, 6), "lora_B": torch.ones(6, 1)},
        "loha": lambda: {f"hada_w{n}_{f}": torch.ones(s) for n in (1, 2) for f, s in (("a", (6, 1)), ("b", (1, 6)))},
        "lokr": lambda: {"lokr_w1": torch.ones(3, 1), "lokr_w2": torch.ones(2, 6)},
    }
    weights = {
        name: LayerWeights(kind, makers[kind](), 1.0, torch.ones(6) if dora else None)
        for name, (kind, dora) in layers.items()
    }
    with pytest.raises(ValueError, match=words):
        peft.write({"unet": weights})
