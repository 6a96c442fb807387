"""A stranger's run steers nothing outside its folder: what its config.yaml names there is not opened unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dreamlora import tiny
from dreamlora.commands.evaluate import evaluate as evaluating
from dreamlora.commands.evaluate.flags import EvaluateConfig
from dreamlora.commands.outside import outside
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.commands.trained import first_run, model_of, prompts_of, run_of
from dreamlora.config import EMBEDDED_MODEL
from dreamlora.errors import UserError
from tests.fuzzing import fuzzed, harmless, odd_values

SAMPLE = {"step": 4, "prompt_index": 0, "image_index": 0, "prompt": "a red fox", "seed": 42, "file": "step_4/a.png"}
READ = (
    *("pretrained_model_name_or_path", "sample_prompts", "resolution", "datasets", "seed", "instance_prompt"),
    *("negative_prompt", "mixed_precision", "family", "optimizer", "x"),
)


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[..., Path]:
    def make(**options: Any) -> Path:
        run = tmp_path / "theirs"
        (run / "samples").mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
        (run / "samples" / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n", encoding="utf-8")
        return run

    return make


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained_model_name_or_path", "/models/sd"),
        ("pretrained_model_name_or_path", "../sd"),
        ("pretrained_model_name_or_path", "~/sd"),
        ("pretrained_model_name_or_path", "a/b/c"),
        ("pretrained_model_name_or_path", "C:\\models\\sd"),
        ("pretrained_vae_model_name_or_path", "./vae"),
        ("clip_model", "/models/clip"),
        ("dino_model", "here"),  # a folder of this name lies where the command is called
        ("inception_weights", "/models/inception.pt"),
        ("dataset_name", "/photos"),
        ("instance_data_dir", "/photos"),
        ("instance_data_dir", "../photos"),
        ("instance_data_dir", "way_out"),
        ("train_data_dir", "/photos"),
        ("mask_data_dir", "/masks"),
        ("class_data_dir", "/class"),
        ("sample_prompts", "/etc/passwd"),
        ("eval_prompts", "~/diary.txt"),
        ("latents_cache_dir", "/cache"),
        ("cache_dir", "/cache"),
        ("logging_dir", "/logs"),
        ("datasets", [{"instance_data_dir": "/photos"}]),
        ("datasets", [{"dataset_name": "owner/photos"}, {"dataset_name": "/photos"}]),
    ],
)
def test_places_outside_are_known(name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "here").mkdir(parents=True)
    (run / "way_out").symlink_to(tmp_path)
    monkeypatch.chdir(run)
    assert outside({name: value}, run) == {name: value}


def test_names_of_the_hub_and_what_lies_in_the_run_are_no_places_outside(tmp_path: Path) -> None:
    options = {
        "pretrained_model_name_or_path": "owner/model",
        "pretrained_vae_model_name_or_path": None,
        "clip_model": EMBEDDED_MODEL,
        "dataset_name": "owner/photos",
        "instance_data_dir": str(tmp_path / "instance_images"),
        "instance_prompt": "/etc/passwd",
        "datasets": [{"dataset_name": "owner/photos", "instance_prompt": "/etc"}],
    }
    assert outside(options, tmp_path) == {}


@pytest.mark.parametrize("model", tiny.MODELS)
def test_an_embedded_model_is_no_place_even_where_a_folder_is_called_so(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / model).mkdir()
    assert outside({"pretrained_model_name_or_path": model}, tmp_path / "run") == {}


def test_the_model_needs_a_flag_and_the_message_has_it(theirs: Callable[..., Path]) -> None:
    run = theirs(pretrained_model_name_or_path="/models/sd", variant="fp16")
    config = SampleConfig(lora=(run,))
    with pytest.raises(UserError, match=r"give --pretrained_model_name_or_path /models/sd, or --trust_runs if"):
        model_of(config, first_run(config))
    for own in ({"pretrained_model_name_or_path": "/models/sd"}, {"trust_runs": True}):
        config = SampleConfig(lora=(run,), **own)
        model = model_of(config, first_run(config))
        assert (model.pretrained_model_name_or_path, model.variant) == ("/models/sd", "fp16")


def test_prompts_are_those_that_the_run_drew(theirs: Callable[..., Path], tmp_path: Path) -> None:
    secret = tmp_path / "diary.txt"
    secret.write_text("dear diary\n", encoding="utf-8")
    run = theirs(sample_prompts=str(secret))
    config = SampleConfig(lora=(run,))
    assert prompts_of(config, first_run(config)) == ("a red fox",)
    (run / "samples" / "samples.jsonl").unlink()
    with pytest.raises(UserError, match="which prompts"):
        prompts_of(config, first_run(config))
    trusting = SampleConfig(lora=(run,), trust_runs=True)
    assert prompts_of(trusting, first_run(trusting)) == ("dear diary",)


def test_what_is_taken_over_is_told(theirs: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    run = theirs(pretrained_model_name_or_path="owner/model", resolution=64, mixed_precision="bf16")
    caplog.set_level("INFO")
    first_run(SampleConfig(lora=(run,), resolution=32))
    [text] = caplog.messages
    assert str(run / "config.yaml") in text and "owner/model" in text and "bf16" in text and "resolution" not in text


@pytest.mark.parametrize("option", ["instance_data_dir", "train_data_dir", "dataset_name"])
def test_photos_are_not_opened_and_the_note_says_how(option: str, theirs: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    run = theirs(**{option: str(tmp_path / "photos"), "latents_cache_dir": str(tmp_path / "cache")})
    real = evaluating._real_images(EvaluateConfig(lora=(run,)), run_of(run))
    [note] = real.notes
    assert not real.training and not real.references
    assert "give --training_images and --references, or --trust_runs" in note and str(tmp_path / "photos") in note
    assert not (tmp_path / "cache").exists()


def test_a_link_in_the_place_of_own_images_is_not_followed(theirs: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    run = theirs(subject="creature")
    (run / "instance_images").symlink_to(tmp_path / "photos")
    [note] = evaluating._real_images(EvaluateConfig(lora=(run,)), run_of(run)).notes
    assert "leads out of the run's folder" in note


@fuzzed
@given(st.dictionaries(st.sampled_from(READ), odd_values, max_size=4))
def test_fuzz_config(tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any]) -> None:
    run = tmp_path_factory.getbasetemp() / "fuzz_config"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(json.dumps(options), encoding="utf-8", errors="surrogatepass")

    def read() -> None:
        config = SampleConfig(lora=(run,))
        known = first_run(config)
        prompts_of(config, known)
        model_of(config, known)

    harmless(read)
