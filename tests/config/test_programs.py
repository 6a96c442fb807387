"""Programs share options; each has flags of its own, and says what to do about those of the other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreamlora import registry
from dreamlora.cli import presets
from dreamlora.cli.declared import options_of
from dreamlora.cli.foreign import ELSEWHERE, UNNEEDED
from dreamlora.cli.parse import parse, parse_run
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.config.programs import PROGRAMS, TextToImageConfig, program_of
from dreamlora.errors import UserError
from dreamlora.sweep.config import CompareConfig

DIFFUSERS_FLAGS = """
pretrained_model_name_or_path revision variant dataset_name dataset_config_name train_data_dir image_column
caption_column validation_prompt num_validation_images validation_epochs max_train_samples output_dir cache_dir seed
resolution center_crop random_flip train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps snr_gamma use_8bit_adam allow_tf32
dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token
prediction_type hub_model_id logging_dir mixed_precision report_to local_rank checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention noise_offset rank
image_interpolation_mode
"""
"""All flags of diffusers' train_text_to_image_lora.py."""

OTHER_MODEL = ["--pretrained_model_name_or_path", "some/model"]


@pytest.mark.parametrize("flag", DIFFUSERS_FLAGS.split())
def test_every_flag_of_diffusers_is_an_option_or_explained(flag: str) -> None:
    ways = [options_of(TextToImageConfig), ELSEWHERE, UNNEEDED]
    assert sum(flag in way for way in ways) == 1


def test_a_command_line_of_diffusers(tmp_path: Path) -> None:
    text = f"--train_data_dir {tmp_path} --caption_column text --resolution 512 --random_flip --snr_gamma 5.0 "
    text += "--train_batch_size 1 --num_train_epochs 2 --learning_rate 1e-04 --max_grad_norm 1 --lr_scheduler constant "
    text += "--lr_warmup_steps 0 --seed 42 --validation_epochs 1 --prediction_type epsilon --noise_offset 0.1"
    config, _ = parse_run([*OTHER_MODEL, *text.split()], TextToImageConfig)
    assert config.data.train_data_dir == tmp_path and config.train.num_train_epochs == 2


def test_defaults_are_those_of_diffusers() -> None:
    train = parse_run(OTHER_MODEL, TextToImageConfig)[0].train
    assert (train.num_train_epochs, train.train_batch_size) == (100, 16)
    assert parse_run(OTHER_MODEL)[0].train.num_train_epochs == 1


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=list(PROGRAMS))
def test_flags_of_the_other_program_are_explained(program: type[RunConfig]) -> None:
    for name, hint in program.NOT_OFFERED.items():
        assert name not in options_of(program)
        with pytest.raises(UserError) as error:
            parse(program, [f"--{name}", "x"])
        assert hint in str(error.value)
        known = {*options_of(program), *options_of(CompareConfig)}
        assert all(flag in known for flag in re.findall(r"--(\w+)", hint))


def test_other_programs_flags_are_not_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_run(["--help"], TextToImageConfig)
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: dreamlora text-to-image" in text and "--train_data_dir" in text and "--shuffle_tags" in text
    assert "instance_prompt" not in text and "if --max_train_steps is not given. (default: 100)" in text


@pytest.mark.parametrize("argv", [[], [*OTHER_MODEL, "--buckets", "--caption_dropout", "0.1"]])
def test_a_saved_config_gives_the_same_config(argv: list[str], tmp_path: Path) -> None:
    config, _ = parse_run(argv, TextToImageConfig)
    flat = as_flat_dict(config)
    assert not flat.keys() & TextToImageConfig.NOT_OFFERED.keys()
    assert program_of(flat) is TextToImageConfig and program_of(as_flat_dict(RunConfig())) is RunConfig
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(flat), encoding="utf-8")
    assert parse_run(["--config", str(file)], TextToImageConfig)[0] == config


def test_a_config_of_the_other_program_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("instance_prompt: a dog\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"key 'instance_prompt' in \S+ is not offered: every image needs a caption"):
        parse_run(["--config", str(file)], TextToImageConfig)


def test_the_embedded_model_learns_a_style() -> None:
    config, _ = parse_run([], TextToImageConfig)
    assert config.data.style == "woodcut" and config.data.subject is None
    assert config.sample.sample_prompts is not None and config.sample.sample_prompts.exists()
    assert parse_run(["--train_data_dir", "prompts"], TextToImageConfig)[0].data.style is None


@pytest.mark.parametrize("optimizer", registry.names("optimizers"))
def test_the_preset_knows_every_optimizers_learning_rate(optimizer: str) -> None:
    assert presets.embedded({"optimizer": optimizer}, TextToImageConfig.PRESET)["learning_rate"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--keep_tags 1", "--keep_tags is only used together with --shuffle_tags"),
        ("--bucket_step 8", "--bucket_step is only used together with --buckets"),
        ("--streaming", "--streaming is only used together with --dataset_name"),
        ("--caption_dropout 1", "--caption_dropout must be at least 0 and below 1"),
        ("--train_data_dir . --dataset_name x", "give either --train_data_dir or --dataset_name"),
        ("--train_data_dir no/such", "--train_data_dir: there is no no/such"),
    ],
)
def test_mistakes(argv: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_run([*OTHER_MODEL, *argv.split()], TextToImageConfig)


def test_every_group_is_shared() -> None:
    def names(program: type[Any]) -> list[str]:
        return [field.name for field in fields(program)]

    assert names(RunConfig) == names(TextToImageConfig)
