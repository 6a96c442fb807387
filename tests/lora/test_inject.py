"""Adapters: which layers, what start, what precision; and that nothing but the seed and the name decides."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.lora.inject import add_lora, target_layers, trainable_parameters

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")


@pytest.fixture
def unet(sd_folder) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")


def prediction(unet: UNet2DConditionModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    noisy, prompt = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 3, 16, generator=draw)
    with torch.no_grad():
        return unet(noisy, 10, prompt).sample


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_start_leaves_the_prediction_and_freezes_the_rest(unet, init):
    before = prediction(unet)
    add_lora(unet, Lora(init=init), ["all"], seed=0)
    assert torch.equal(prediction(unet), before)
    names = trainable_parameters(unet)
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert all(not p.any() for name, p in names.items() if "lora_B" in name)


def test_start_depends_on_seed_and_name_alone(sd_folder):
    def start(layers, seed, disturb):
        unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
        torch.manual_seed(disturb)
        add_lora(unet, Lora(), layers, seed=seed)
        return {name: parameter.clone() for name, parameter in trainable_parameters(unet).items()}

    first, again, fewer, other = (
        start(ATTENTION, 3, 1),
        start(ATTENTION, 3, 2),
        start(["to_v"], 3, 1),
        start(ATTENTION, 4, 1),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], fewer[name]) for name in fewer)
    down = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in down)
    assert len({tuple(first[name].flatten()[:4].tolist()) for name in down}) == len(down)


def test_gaussian_start_has_a_deviation_of_one_over_rank(sd_folder):
    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    add_lora(unet, Lora(rank=64), ["to_v"], seed=0)
    values = torch.cat([p.detach().flatten() for name, p in trainable_parameters(unet).items() if "lora_A" in name])
    assert math.isclose(values.std(), 1 / 64, rel_tol=0.05)
    assert abs(values.mean()) < 1e-3


def test_kaiming_start_is_uniform_within_the_root_of_the_inputs(sd_folder):
    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    add_lora(unet, Lora(rank=200, init="kaiming"), ["conv1", "to_v"], seed=0)
    for name, values in trainable_parameters(unet).items():
        if "lora_A" in name:
            values = values.detach()
            bound = values[0].numel() ** -0.5
            assert values.abs().max() <= bound
            assert math.isclose(values.std(), bound / math.sqrt(3), rel_tol=0.06), name


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 1.5), (0.5, 0.125)])
def test_update_is_scaled_by_alpha_over_rank(unet, alpha, scale):
    add_lora(unet, Lora(rank=4, lora_alpha=alpha), ["to_v"], seed=0)
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn1.to_v"))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    update = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(3, update.shape[1])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ update.T)


def test_lora_is_fp32_in_a_bf16_model(sd_folder):
    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet", torch_dtype=torch.bfloat16)
    add_lora(unet, Lora(), ["all"], seed=0)
    assert {p.dtype for p in trainable_parameters(unet).values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_rank_above_the_layers_size_is_kept(unet):
    add_lora(unet, Lora(rank=100), ["to_q"], seed=0)
    assert {min(p.shape) for p in trainable_parameters(unet).values()} <= set(range(8, 17))
    assert {max(p.shape) for p in trainable_parameters(unet).values()} == {100}


def adapted(module: torch.nn.Module) -> set[str]:
    return {name.split(".lora_")[0] for name in trainable_parameters(module)}


@pytest.mark.parametrize("layers", ["all", "all-linear"])
def test_all_layers_but_the_ends_and_the_time_embedding(sd_folder, layers):
    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    kinds = (torch.nn.Linear, torch.nn.Conv2d) if layers == "all" else (torch.nn.Linear,)
    wanted = {
        name
        for name, layer in unet.named_modules()
        if isinstance(layer, kinds) and not name.startswith(("conv_in", "conv_out", "time_embedding"))
    }
    add_lora(unet, Lora(), [layers], seed=0)
    assert adapted(unet) == wanted
    assert any("conv1" in name for name in wanted) == (layers == "all")


def test_text_encoder(sd_folder):
    encoder = CLIPTextModel.from_pretrained(sd_folder, subfolder="text_encoder")
    add_lora(encoder, Lora(rank=2), ("q_proj", "fc1"), seed=0)
    assert len(adapted(encoder)) == 4


def test_unknown_layer_names_some_that_exist(unet):
    with pytest.raises(UserError, match=r"ends in 'to_kv'.*to_k, .*to_out\.0") as error:
        add_lora(unet, Lora(), ["to_q", "to_kv"], seed=0)
    assert "time_embedding" not in str(error.value)
    with pytest.raises(UserError, match="no Linear or Conv2d"):
        target_layers(unet, ["norm1"])
    with pytest.raises(UserError, match="'o_q'"):
        target_layers(unet, ["o_q"])
