"""Which layers are meant by parts of their names, and what PEFT is told of their ranks and alphas."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dreamlora import registry
from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.lora.inject import add_lora
from dreamlora.lora.pairs import tuned_layers
from dreamlora.lora.targets import alpha_of, layer_names, patterns, rank_of, require_patterns, target_layers


def net() -> nn.Module:
    """As transformers for images are: two lists of blocks, and layers outside of them."""

    def block() -> nn.Module:
        attn = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_out": nn.ModuleList([nn.Linear(4, 4)])})
        return nn.ModuleDict({"attn": attn, "proj": nn.Linear(4, 4)})

    blocks = nn.ModuleList([block() for _ in range(12)])
    return nn.ModuleDict({"blocks": blocks, "single": nn.ModuleList([block(), block()]), "proj": nn.Linear(4, 4)})


@pytest.fixture
def unet(sd_folder) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")


@pytest.mark.parametrize(
    ("layers", "blocks", "count"),
    [
        (["to_q"], [], 14),
        (["to_q"], ["1"], 2),
        (["to_q"], ["7-11"], 5),
        (["to_q"], ["7-11", "0"], 7),
        (["to_q"], ["single"], 2),
        (["to_q"], ["single.1"], 1),
        (["to_q"], ["blocks.2-4", "single.0-1"], 5),
        (["proj"], [], 15),
        (["single.*.proj"], [], 2),
        (["blocks.0-3.attn.to_out.0", "to_q"], ["3-4"], 3),
        (["all-linear"], ["blocks.11"], 3),
    ],
)
def test_layers_and_blocks(layers: list[str], blocks: list[str], count: int) -> None:
    module = net()
    names = layer_names(module, layers, blocks)
    assert len(names) == len(set(names)) == count
    made = inject_adapter_in_model(LoraConfig(r=1, target_modules=target_layers(module, layers, blocks)), module)
    assert [layer.name for layer in tuned_layers(made)] == names


@pytest.mark.parametrize("block", ["12", "12-20", "blocks.12", "block", "q"])
def test_a_block_that_does_not_exist_names_those_that_do(block: str) -> None:
    with pytest.raises(UserError, match=rf"--lora_blocks: .* lies in '{block}'. They lie in blocks.0-11, single.0-1"):
        layer_names(net(), ["to_q"], ["0", block])


def test_numbers_are_those_of_the_outermost_list(unet) -> None:
    names = layer_names(unet, ["to_q"], ["0"])
    assert names and all(
        name.startswith(("down_blocks.0.", "up_blocks.0.", "mid_block.attentions.0.")) for name in names
    )


def test_the_first_pattern_that_fits_counts() -> None:
    lora = Lora(rank=4, rank_pattern=("blocks.0-1.attn", "2", "attn", "8", "text_encoder", "3"))
    assert rank_of(lora, "transformer", "blocks.1.attn.to_q") == 2
    assert rank_of(lora, "transformer", "blocks.2.attn.to_q") == 8
    assert rank_of(lora, "transformer", "blocks.2.proj") == 4
    assert rank_of(lora, "text_encoder", "layers.0.q_proj") == 3
    assert alpha_of(lora, "transformer", "blocks.2.attn.to_q") == 8
    given = Lora(lora_alpha=2.0, rank_pattern=("attn", "8"), alpha_pattern=("to_out", "5"))
    assert alpha_of(given, "transformer", "blocks.2.attn.to_q") == 2
    assert alpha_of(given, "transformer", "blocks.2.attn.to_out.0") == 5


@pytest.mark.parametrize("flag", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_nothing_is_refused(flag: str) -> None:
    lora: Any = Lora(**{flag: ("to_q", "2", "to_x", "3")})
    with pytest.raises(UserError, match=rf"--{flag}: .* 'to_x' .*There are .*to_q.*transformer.blocks.0-11"):
        require_patterns(lora, {"transformer": layer_names(net(), ["to_q"])})
    require_patterns(Lora(rank_pattern=("transformer", "2")), {"transformer": ["a.to_q"]})


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("ff",), "takes pairs of a name and a value"),
        (("ff", "0"), "ff takes a whole number above 0"),
        (("ff", "1.5"), "ff takes a whole number above 0"),
        (("ff", "99999"), "at most 16384"),
        (("ff", "2", "ff", "3"), "was given before"),
        (("", "2"), "is no name"),
    ],
)
def test_patterns_that_are_none(words: tuple[str, ...], why: str) -> None:
    with pytest.raises(UserError, match=f"--rank_pattern.* {why}"):
        Lora(rank_pattern=words)


def test_peft_is_told_the_shortest_ends_of_names() -> None:
    ranks = {"a.0.q": 4, "a.1.q": 8, "a.0.ff.2": 8, "a.1.ff.2": 8, "b.q": 4, "c.a.1.q": 4}
    assert patterns(ranks, 4) == {"^a.1.q": 8, "ff.2": 8}
    assert patterns(dict.fromkeys(ranks, 4), 4) == {}


@pytest.mark.parametrize("adapter", registry.names("adapters"))
def test_every_layer_gets_its_rank_and_alpha(adapter: str, unet) -> None:
    lora = Lora(rank=3, adapter=adapter, rank_pattern=("down_blocks.0", "2", "ff", "5"), alpha_pattern=("attn1", "6"))
    add_lora(unet, lora, ["all-linear"], "unet")
    for layer in tuned_layers(unet):
        wanted = 2 if layer.name.startswith("down_blocks.0.") else 5 if ".ff." in layer.name else 3
        assert layer.rank == wanted, layer.name
        assert layer.alpha == pytest.approx(6 if ".attn1." in layer.name else wanted), layer.name


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_rslora_divides_by_the_root(adapter: str, unet) -> None:
    add_lora(unet, Lora(rank=4, lora_alpha=3.0, adapter=adapter, use_rslora=True), ["to_q"])
    assert {layer.scaling for layer in tuned_layers(unet)} == {1.5}
