"""Adapters: which layers, what precision, what scale."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.targets import target_layers


@pytest.fixture
def unet(sd_folder) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")


def prediction(unet: UNet2DConditionModel) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    noisy, prompt = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 3, 16, generator=draw)
    with torch.no_grad():
        return unet(noisy, 10, prompt).sample


def test_the_adapter_leaves_the_prediction_and_freezes_the_rest(unet):
    before = prediction(unet)
    add_lora(unet, Lora(), ["all"])
    assert torch.equal(prediction(unet), before)
    names = trainable_parameters(unet)
    assert names
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert all(not p.any() for name, p in names.items() if "lora_B" in name)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 1.5), (0.5, 0.125)])
def test_update_is_scaled_by_alpha_over_rank(unet, alpha, scale):
    add_lora(unet, Lora(rank=4, lora_alpha=alpha), ["to_v"])
    layer = next(module for name, module in unet.named_modules() if name.endswith("attn1.to_v"))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    update = scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    x = torch.randn(3, update.shape[1])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ update.T)


def test_lora_is_fp32_in_a_bf16_model(sd_folder):
    unet = UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet", torch_dtype=torch.bfloat16)
    add_lora(unet, Lora(), ["all"])
    assert {p.dtype for p in trainable_parameters(unet).values()} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_rank_above_the_layers_size_is_kept(unet):
    add_lora(unet, Lora(rank=100), ["to_q"])
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
    add_lora(unet, Lora(), [layers])
    assert adapted(unet) == wanted
    assert any("conv1" in name for name in wanted) == (layers == "all")


def test_text_encoder(sd_folder):
    encoder = CLIPTextModel.from_pretrained(sd_folder, subfolder="text_encoder")
    add_lora(encoder, Lora(rank=2), ("q_proj", "fc1"))
    assert len(adapted(encoder)) == 4


def test_an_end_of_names_that_is_a_layer_in_some_blocks_and_a_list_in_others(unet):
    """FLUX.2 has such: PEFT is told the layers alone, and would refuse the lists."""
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out = torch.nn.Linear(16, 16)
    add_lora(unet, Lora(), ["to_q", "to_out"])
    found = {name.rpartition(".")[2] for name in adapted(unet)}
    assert found == {"to_q", "to_out"}
    assert sum(name.endswith("to_out") for name in adapted(unet)) == 1


def test_unknown_layer_names_some_that_exist(unet):
    with pytest.raises(UserError, match=r"ends in 'to_kv'.*to_k, .*to_out\.0") as error:
        add_lora(unet, Lora(), ["to_q", "to_kv"])
    assert "time_embedding" not in str(error.value)
    with pytest.raises(UserError, match="no Linear or Conv2d"):
        target_layers(unet, ["norm1"])
    with pytest.raises(UserError, match="'o_q'"):
        target_layers(unet, ["o_q"])


def test_convolutions_in_groups_have_no_dora(unet):
    unet.mid_block.resnets[0].conv1 = torch.nn.Conv2d(8, 8, 3, groups=4)
    with pytest.raises(UserError, match=r"--adapter dora: mid_block\.resnets\.0\.conv1 is a convolution in groups"):
        add_lora(unet, Lora(adapter="dora"), ["all"])
    add_lora(unet, Lora(adapter="lokr"), ["all"])
