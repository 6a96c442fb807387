"""What a LoRA's metadata may decide: its alphas, within bounds; and that nothing of it reaches PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.lora.applying import apply_lora
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.pairs import adapted_layers
from dreamlora.lora.saving import save_lora
from dreamlora.lora.settings import METADATA_KEY, Settings, settings_of
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless, odd_values

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
ENDLESS = "(.*.*.*.*.*.*.*.*)*x!"
PLAIN = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v"]}


@pytest.fixture(scope="module")
def pipeline(sd_folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(sd_folder)


@pytest.fixture(scope="module")
def own(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    donor = DiffusionPipeline.from_pretrained(sd_folder).unet
    add_lora(donor, Lora(rank=2), PLAIN["target_modules"])
    draw = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(donor).values():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return load_file(save_lora(tmp_path_factory.mktemp("own"), {"unet": donor}))


def text_of(settings: Mapping[str, Any]) -> str:
    return json.dumps({f"unet.{name}": value for name, value in settings.items()})


def applied(pipeline: DiffusionPipeline, own: dict[str, torch.Tensor], tmp_path: Path, text: str) -> dict[str, float]:
    """Scale of every layer."""
    file = tmp_path / "lora.safetensors"
    save_file(own, file, metadata={METADATA_KEY: text})
    try:
        apply_lora(pipeline, file)
        return {layer.name: layer.scaling for layer in adapted_layers(pipeline.unet)}
    finally:
        pipeline.unload_lora_weights()
        assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())


IGNORED = {
    "target_modules": ENDLESS,
    "exclude_modules": ENDLESS,
    "layers_pattern": ENDLESS,
    "layers_to_transform": [10**9],
    "lora_dropout": 0.5,
    "base_model_name_or_path": "https://example.org/x",
    "auto_mapping": {"parent_library": "os", "base_model_class": "system"},
    "task_type": "anything",
    "fan_in_fan_out": True,
    "runtime_config": 5,
    "init_lora_weights": "gaussian",
    "eva_config": {"rho": -1},
    "use_dora": False,
    "loftq_config": {},
    "something_new": None,
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_does_not_say_what_a_lora_computes_is_not_read(name, pipeline, own, tmp_path):
    found = harmless(lambda: applied(pipeline, own, tmp_path, text_of({**PLAIN, name: IGNORED[name]})))
    assert set(found.values()) == {2.0} and len(found) == len(own) // 2
    assert not any(isinstance(part, torch.nn.Dropout) and part.p for part in pipeline.unet.modules())


MORE_THAN_PLAIN = {
    "init_lora_weights": ("pissa", "pissa_niter_1000000", "olora", "corda", "loftq", "lora_ga", 7),
    "loftq_config": ({"loftq_bits": 4},),
    "corda_config": ({"cov_file": "/etc/passwd"},),
    "megatron_config": ({"a": 1},),
    "layer_replication": ([[0, 10**6]],),
    "target_parameters": (["weight"],),
    "trainable_token_indices": ([1],),
    "modules_to_save": (["conv_in"],),
    "bias": ("all", 3),
    "use_dora": (True,),
    "lora_bias": (True,),
    "arrow_config": ({"top_k": 3},),
    "use_qalora": (True,),
    "alora_invocation_tokens": ([1],),
    "peft_type": ("LOHA",),
    "something_new": (1, "x"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, some in MORE_THAN_PLAIN.items() for value in some])
def test_settings_of_more_than_a_plain_lora_are_refused_by_name(name, value, pipeline, own, tmp_path):
    error = harmless(lambda: applied(pipeline, own, tmp_path, text_of({**PLAIN, name: value})))
    assert isinstance(error, UserError) and f"unet.{name}" in str(error) and len(str(error)) < 600


NO_NUMBERS = [None, True, "2", "NaN", [2], {"a": 2}, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("name", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [*NO_NUMBERS, 10**10, -(10**10)], ids=lambda value: str(value)[:10])
def test_numbers_out_of_bounds_and_of_other_types(name, value, pipeline, own, tmp_path):
    given = {name: {"to_q": value}} if "pattern" in name else {name: value}
    error = harmless(lambda: applied(pipeline, own, tmp_path, text_of({**PLAIN, **given})))
    assert isinstance(error, UserError) and "metadata" in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("value", [0, -1, 2.0, 3, 10**9])
def test_ranks_are_those_of_the_tensors(value, pipeline, own, tmp_path):
    error = harmless(lambda: applied(pipeline, own, tmp_path, text_of({**PLAIN, "r": value})))
    assert isinstance(error, UserError)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [ENDLESS, "(", "to_q|to_k", ".*", "to_.", "", "^", "a..b", "\\d"])
def test_patterns_are_names_and_no_expressions(name, pattern, pipeline, own, tmp_path):
    error = harmless(lambda: applied(pipeline, own, tmp_path, text_of({**PLAIN, name: {pattern: 2}})))
    assert isinstance(error, UserError) and "only names of layers are read" in str(error)


@pytest.mark.parametrize(
    ("patterns", "own_alpha", "others"),
    [
        ({"to_q": 8}, 8, 4),
        ({"attn1.to_q": 6, "to_q": 8}, 6, 4),
        ({"to_q": 8, "attn1.to_q": 6}, 8, 4),
        ({f"^{LAYER}": 1}, 1, 4),
        ({LAYER.replace(".", "\\.") + "$": 1.5}, 1.5, 4),
        ({"o_q": 8, "^to_q": 8, "q": 8}, 4, 4),
    ],
)
def test_patterns_of_alphas_mean_what_they_mean_to_peft(patterns, own_alpha, others, pipeline, own, tmp_path):
    found = applied(pipeline, own, tmp_path, text_of({**PLAIN, "alpha_pattern": patterns}))
    assert found[LAYER] == own_alpha / 2 and found[LAYER.replace("to_q", "to_k")] == others / 2
    layer = peft.utils.other.get_pattern_key(patterns, LAYER)
    assert patterns.get(layer, 4) == own_alpha


def test_ranks_by_pattern_and_rslora(pipeline, own, tmp_path):
    mixed = {
        name: (tensor[:1] if "lora_A" in name else tensor[:, :1]).contiguous() if "to_q" in name else tensor
        for name, tensor in own.items()
    }
    text = text_of({**PLAIN, "rank_pattern": {"to_q": 1}, "use_rslora": True})
    found = applied(pipeline, mixed, tmp_path, text)
    assert found[LAYER] == pytest.approx(4) and found[LAYER.replace("to_q", "to_k")] == pytest.approx(4 / math.sqrt(2))
    with pytest.raises(UserError, match=r"says that .*to_q has rank 2, and its tensors are of rank 1"):
        applied(pipeline, mixed, tmp_path, text_of(PLAIN))


def test_many_patterns_take_no_time():
    many = {f"block_{number}.to_q": 1.0 for number in range(16_000)}
    settings = settings_of({METADATA_KEY: text_of({**PLAIN, "alpha_pattern": many})})["unet"]
    found = harmless(lambda: [settings.alpha_of(f"a.block_{number}.to_q", 2) for number in range(5_000)])
    assert set(found) == {1.0}


def test_clip_with_and_without_its_inner_name():
    settings = Settings(2, 4.0, alphas={"^text_model.encoder.q_proj": 1.0})
    assert settings.alpha_of("encoder.q_proj", 2) == settings.alpha_of("text_model.encoder.q_proj", 2) == 1.0


def test_a_part_that_the_metadata_does_not_name(pipeline, own, tmp_path):
    with pytest.raises(UserError, match="tensors for the unet, of which its metadata says nothing"):
        applied(pipeline, own, tmp_path, json.dumps({"text_encoder.r": 2, "text_encoder.lora_alpha": 4}))


def test_other_metadata_is_not_looked_at(pipeline, own, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(own, file, metadata={"ss_network_alpha": "1e999", "ss_tag_frequency": "{" * 10**6, "format": ENDLESS})
    apply_lora(pipeline, file)
    pipeline.unload_lora_weights()


SOUND = {**PLAIN, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3.5, f"^{LAYER}": 2}, "use_rslora": True}
SOUND = {f"unet.{name}": value for name, value in SOUND.items()}


@fuzzed
@given(
    st.one_of(
        changed(SOUND).map(as_json),
        damaged(as_json(SOUND)),
        odd_values.map(lambda odd: as_json({**SOUND, "unet.alpha_pattern": {str(odd): odd}})),
    )
)
def test_fuzz_metadata(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    settings = harmless(lambda: settings_of({METADATA_KEY: text}), ValueError)
    if not isinstance(settings, ValueError):
        for each in settings.values():
            harmless(lambda each=each: each.alpha_of(LAYER, 2), ValueError)
