"""Every option's default lies in its range, and what lies outside is refused with the flag's name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from accelerate.utils import LoggerType

from dreamlora.config import Data, Eval, Lora, Model, Optim, RunConfig, Sample, Tracker, Train, as_flat_dict
from dreamlora.errors import UserError


@pytest.mark.parametrize(
    ("group", "option", "value", "told"),
    [
        (Lora, "rank", 0, "--rank must be at least 1 (got 0)"),
        (Lora, "lora_alpha", 0.0, "--lora_alpha must be above 0 (got 0.0)"),
        (Lora, "lora_dropout", 1.0, "--lora_dropout must be at least 0 and below 1 (got 1.0)"),
        (Data, "num_class_images", 0, "--num_class_images must be at least 1"),
        (Data, "prior_loss_weight", -1.0, "--prior_loss_weight must be at least 0"),
        (Data, "holdout", -1, "--holdout must be at least 0"),
        (Data, "resolution", 7, "--resolution must be at least 8"),
        (Optim, "learning_rate", float("nan"), "--learning_rate must be at least 0 (got nan)"),
        (Optim, "learning_rate", float("inf"), "--learning_rate must be at least 0 (got inf)"),
        (Optim, "lr_warmup_steps", 1.5, "--lr_warmup_steps must be a whole number of steps, or below 1 for a share"),
        (Optim, "lr_warmup_steps", -0.1, "--lr_warmup_steps must be at least 0 (got -0.1)"),
        (Optim, "lr_power", float("nan"), "--lr_power must be finite (got nan)"),
        (Train, "guidance_scale", float("-inf"), "--guidance_scale must be finite (got -inf)"),
        (Optim, "adam_beta2", 1.0, "--adam_beta2 must be at least 0 and below 1"),
        (Optim, "optimizer", "adamv", "--optimizer: unknown name 'adamv'"),
        (Optim, "optimizer_args", ("eps",), "--optimizer_args takes pairs of a name and a value (got 'eps')"),
        (Model, "family", "sdd", "--family: unknown name 'sdd'"),
        (Train, "max_train_steps", 0, "--max_train_steps must be at least 1"),
        (Train, "seed", -1, "--seed must be at least 0"),
        (Train, "snr_gamma", 0.0, "--snr_gamma must be above 0"),
        (Sample, "num_inference_steps", 0, "--num_inference_steps must be at least 1"),
        (Eval, "eval_batch_size", 0, "--eval_batch_size must be at least 1"),
        (Eval, "final_eval_items", -1, "--final_eval_items must be at least 0"),
        (Eval, "early_stopping", -1, "--early_stopping must be at least 0"),
        (Eval, "eval_metrics", ("clip_scoer",), "--eval_metrics: unknown name 'clip_scoer'"),
        (Eval, "eval_num_images", 0, "--eval_num_images must be at least 1"),
    ],
)
def test_values_out_of_range_name_the_flag(group: Any, option: str, value: Any, told: str) -> None:
    with pytest.raises(UserError) as error:
        group(**{option: value})
    assert told in str(error.value)


def test_the_trackers_are_those_of_accelerate() -> None:
    assert sorted(get_args(Tracker)) == sorted(kind.value for kind in LoggerType)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"instance_data_dir": Path("a"), "dataset_name": "b"}, "either --instance_data_dir or --dataset_name"),
        ({"with_prior_preservation": True}, "--with_prior_preservation needs --class_prompt"),
        ({"class_data_dir": Path("a")}, "--class_data_dir is only used together with --with_prior_preservation"),
    ],
)
def test_options_that_do_not_go_together(data: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        RunConfig(data=Data(**data))


def test_text_encoder_rate_needs_a_text_encoder_that_trains() -> None:
    with pytest.raises(UserError, match="--text_encoder_lr is only used together with --train_text_encoder"):
        RunConfig(optim=Optim(text_encoder_lr=1e-4))
    RunConfig(optim=Optim(text_encoder_lr=1e-4), lora=Lora(train_text_encoder=True))


def test_names_are_kept_as_the_registry_spells_them() -> None:
    assert Optim(optimizer="Scaled-AdamW").optimizer == "scaled_adamw"


def test_the_flat_form_is_plain_yaml_with_every_option_once() -> None:
    flat = as_flat_dict(RunConfig(train=Train(output_dir=Path("out/x")), lora=Lora(lora_layers=("to_q",))))
    assert yaml.safe_load(yaml.safe_dump(flat)) == flat
    assert (flat["output_dir"], flat["lora_layers"]) == ("out/x", ["to_q"])
    declared = [group for group in dataclasses.fields(RunConfig) if group.name not in ("given", "sources")]
    groups = [getattr(RunConfig(), group.name) for group in declared]
    assert len(flat) == sum(len(dataclasses.fields(group)) for group in groups) - len(RunConfig.NOT_OFFERED)


def test_configs_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().lora.rank = 3  # type: ignore[misc]
