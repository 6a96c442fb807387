"""What a run's LoRA file says of itself: what others read, nothing private, and nothing at all if that is wanted."""

from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from dreamlora.data.images import ImageRecord
from dreamlora.run import header
from dreamlora.runfolder import RunFolder
from tests.training.conftest import cache, flags, no_report, photos, train

__all__ = ["cache", "flags", "no_report", "photos", "train"]

UNITS = ["--lora_units", "start", "--learning_rate", "0.01"]
SHORT = ["--max_train_steps", "2", "--sample_steps", "0", "--eval_steps", "0", "--no_parity_check"]


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_a_file_says_how_it_was_trained(train: Callable[..., RunFolder], tmp_path: Path, no_report: None) -> None:
    about = ["--metadata_author", "Ada", "--metadata_license", "CC0-1.0", "--metadata_tags", "dog, photo"]
    lora = ["--use_rslora", "--lora_alpha", "2", "--rank_pattern", "attn2", "4", "--new_tokens", "<new>=d"]
    run = train(*SHORT, *about, *lora, "--optimizer", "sgd", "--optimizer_args", "momentum", "0.5", *UNITS)
    found = metadata_of(run.lora_file)
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "run",
        "modelspec.author": "Ada",
        "modelspec.license": "CC0-1.0",
        "modelspec.tags": "dog, photo",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "sks dog, <new>",
        "ss_output_name": "run",
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": "2",
        "ss_network_alpha": str(2 * (2 / 2**0.5)),
        "ss_network_module": "networks.lora",
        "ss_resolution": "(16, 16)",
        "ss_steps": "2",
        "ss_max_train_steps": "2",
        "ss_optimizer": "sgd momentum 0.5",
        "ss_learning_rate": "0.01",
        "ss_text_encoder_lr": "None",
        "ss_seed": "0",
        "dreamlora.optimizer": "sgd",
        "dreamlora.lora_units": "start",
        "dreamlora.rank_pattern": '["attn2", "4"]',
        "dreamlora.step": "2",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "modelspec.description" not in found
    tags = json.loads(found["ss_tag_frequency"])
    assert tags == {"dataset_0": {"a photo of sks dog": int(found["ss_num_train_images"])}}
    whole = "\n".join(found.values())
    for private in (str(tmp_path), str(Path.home()), getpass.getuser(), platform.node()):
        assert private not in whole
    kept = metadata_of(run.checkpoint_dir(2) / run.lora_file.name)
    assert {**kept, "modelspec.date": ""} == {**found, "modelspec.date": ""}


def test_captions_can_be_left_out(train: Callable[..., RunFolder], no_report: None) -> None:
    run = train(*SHORT, "--no_metadata_captions", "--adapter", "dora", "--ema_decay", "0.5", "--new_tokens", "sks=d")
    found = metadata_of(run.lora_file)
    assert found["modelspec.title"] == "run"
    assert "sks" not in "\n".join(found.values())
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"]) == {"algo": "lora", "dora_wd": "True"}
    assert found["dreamlora.ema_decay"] == "0.5"
    assert "dreamlora.ema_decay" not in metadata_of(run.raw / run.lora_file.name)


def test_all_can_be_left_out(train: Callable[..., RunFolder], no_report: None) -> None:
    found = metadata_of(train(*SHORT, "--no_metadata").lora_file)
    assert found.keys() == {"format", "lora_adapter_metadata"}


@pytest.mark.parametrize("count", [3, header.MOST_TAGS + 5])
def test_tags_are_counted_and_bounded(count: int) -> None:
    captions = [f"dog, tag {number}, , {'x' * 500}" for number in range(count)]
    records = [ImageRecord(str(n), caption, bytes, "here", dataset=n % 2) for n, caption in enumerate(captions)]
    found = header._tag_frequency(records)
    assert found.keys() == {"dataset_0", "dataset_1"}
    assert found["dataset_0"]["dog"] == (count + 1) // 2
    assert all(len(tags) <= header.MOST_TAGS for tags in found.values())
    assert max(map(len, found["dataset_0"])) == 200
