"""What a part's config may say, whatever it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    FluxTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPConfig, CLIPTextConfig, Dinov2Config, SiglipConfig, T5Config, ViTConfig

from dreamlora.errors import UserError
from dreamlora.models import configs
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

MODELS = (UNet2DConditionModel, AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel, PNDMScheduler)
CONFIGS = (CLIPTextConfig, CLIPConfig, T5Config, ViTConfig, Dinov2Config, SiglipConfig)

SD_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 96,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
    "upcast_attention": True,
}
"""As Stable Diffusion 2.1 has it."""
CLIP = {
    "_commit_hash": None,
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "bad_words_ids": None},
    "text_config_dict": {"hidden_size": 768, "num_hidden_layers": 12, "bos_token_id": 0, "eos_token_id": 2},
    "torch_dtype": "float32",
    "vision_config": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "id2label": {"0": "A b"},
    },
    "vision_config_dict": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14},
}
"""As OpenAI's has it."""


def written(folder: Path, content: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_real_configs_are_taken_whole(tmp_path):
    file = written(tmp_path, SD_UNET)
    taken = configs.arguments_for(UNet2DConditionModel, file)
    assert taken == {name: value for name, value in SD_UNET.items() if not name.startswith("_")}
    config = configs.config_for(CLIPConfig, written(tmp_path, CLIP))
    assert (config.text_config.eos_token_id, config.text_config.num_hidden_layers) == (2, 12)
    assert (config.vision_config.num_hidden_layers, config.vision_config.patch_size) == (24, 14)
    names = {"hidden_size": 4096, "num_layers": 24, "num_attention_heads": 64, "feed_forward_proj": "gated-gelu"}
    t5 = configs.config_for(T5Config, written(tmp_path, names))
    assert (t5.d_model, t5.num_heads, t5.dense_act_fn) == (4096, 64, "gelu_new")


def test_a_whole_clip_has_the_text_models_config_inside(tmp_path):
    assert configs.config_for(CLIPTextConfig, written(tmp_path, CLIP)).hidden_size == 768


def test_what_other_schedulers_take_is_kept_for_them(tmp_path):
    given = {"skip_prk_steps": True, "rescale_betas_zero_snr": True, "lambda_min_clipped": float("-inf"), "evil": 1}
    taken = configs.arguments_for(PNDMScheduler, written(tmp_path, given), [DDIMScheduler])
    assert taken == {"skip_prk_steps": True, "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("part_class", MODELS)
def test_defaults_of_the_classes_are_taken(part_class, tmp_path):
    with torch.device("meta"):
        part_class().save_config(tmp_path)
    (file,) = tmp_path.glob("*.json")
    own = {name for name in json.loads(file.read_text(encoding="utf-8")) if not name.startswith("_")}
    derived = {"block_out_channels"} if part_class is AutoencoderTiny else set()
    assert configs.arguments_for(part_class, file).keys() == own - derived


def test_a_quantized_model_is_told_apart(tmp_path):
    file = written(tmp_path, SD_UNET | {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(UserError, match=r"quantized.*Give the model that they were made from.*--base_precision.*nf4"):
        configs.read_config(file)


@fuzzed
@given(st.sampled_from(MODELS), changed(SD_UNET))
def test_fuzz_arguments(tmp_path_factory, part_class, content):
    file = tmp_path_factory.getbasetemp() / "arguments.json"
    file.write_bytes(as_json(content))
    harmless(lambda: configs.arguments_for(part_class, file))


@fuzzed
@given(st.sampled_from(CONFIGS), changed(CLIP))
def test_fuzz_config(tmp_path_factory, config_class, content):
    file = tmp_path_factory.getbasetemp() / "config.json"
    file.write_bytes(as_json(content))
    harmless(lambda: configs.config_for(config_class, file))


@fuzzed
@given(damaged(json.dumps(SD_UNET).encode()))
def test_fuzz_bytes_of_a_config(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "bytes.json"
    file.write_bytes(content)
    harmless(lambda: configs.arguments_for(UNet2DConditionModel, file))
