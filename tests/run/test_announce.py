"""What a run says before its first step is what its config.yaml and its report have."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamlora.report import words
from dreamlora.report.facts import RunFacts
from dreamlora.runfolder import RunFolder
from tests.training.conftest import train_with

SHORT = ["--max_train_steps", "2", "--num_class_images", "2", "--no_parity_check", "--final_eval_items", "0"]
SHORT += ["--eval_metrics"]
OFF = "--sample_steps 0 --eval_steps 0 --checkpointing_steps 0 --no_train_text_encoder --no_with_prior_preservation"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, two of them with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    for number in (0, 1):
        (folder / f"{number}.txt").write_text(f"caption {number}", encoding="utf-8")
    return folder


CASES = {
    "embedded": [],
    "nothing besides": OFF.split(),
    "photos": [*OFF.split(), "--instance_prompt", "a photo of sks dog", "--holdout", "2", "--repeats", "3"],
    "accumulated": ["--train_batch_size", "2", "--gradient_accumulation_steps", "3", "--scale_lr"],
    "buckets": ["--buckets", "--bucket_step", "8", "--lora_layers", "to_q", "to_k", "--optimizer", "sgd"],
}


@pytest.mark.parametrize("case", CASES)
def test_told_kept_and_shown_alike(case: str, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = [*SHORT, *CASES[case], *(["--instance_data_dir", str(photos)] if case == "photos" else [])]
    with caplog.at_level(logging.INFO):
        run = train_with(
            [*flags, "--output_dir", str(tmp_path / "run"), "--latents_cache_dir", str(tmp_path / "cache")]
        )
    kept = json.loads(run.outline_file.read_text(encoding="utf-8"))
    told = [re.split(r"  +", record.getMessage(), maxsplit=1) for record in caplog.records]
    outline = dict(line for line in told if line[0] in kept)
    assert list(outline.items()) == list(kept.items()) == list(RunFacts(run).outline)
    page, text = (
        run.report_html.read_text(encoding="utf-8"),
        run.report_md.read_text(encoding="utf-8").replace("\\", ""),
    )
    assert all(
        f"| {name} | {value} |" in text and f'<th scope="row">{name}</th>' in page for name, value in outline.items()
    )
    agrees_with_config(outline, run.config(), run)
    agrees_with_report(outline, RunFacts(run))


def agrees_with_config(outline: dict[str, str], config: dict[str, Any], run: RunFolder) -> None:
    batch, accumulation = config["train_batch_size"], config["gradient_accumulation_steps"]
    each = f"each of {batch * accumulation} images (batch {batch} × {accumulation} accumulated"
    assert outline["steps"].startswith(f"{config['max_train_steps']}, {each}")
    assert ("class images" in outline) == config["with_prior_preservation"] == ("class images" in outline["steps"])
    if config["with_prior_preservation"]:
        start = f'{config["num_class_images"]} of "{config["class_prompt"]}" in '
        assert outline["class images"].startswith(start)
        folder = Path(outline["class images"].removeprefix(start).partition("; ")[0])
        assert len(list(folder.glob("*.png"))) == config["num_class_images"]
    assert outline["LoRA"].startswith(f"rank {config['rank']}, alpha {config['lora_alpha']:g}, init {config['init']}")
    assert ("text encoder" in outline["LoRA"]) == config["train_text_encoder"]
    assert outline["optimizer"].startswith(f"{config['optimizer']}, learning rate {config['learning_rate']:g}")
    assert config["lr_scheduler"] in outline["optimizer"] and not config["scale_lr"]
    assert ("warm-up" in outline["optimizer"]) == (config["lr_scheduler"] != "constant")
    assert str(config["resolution"]) in outline["size"] and ("shapes" in outline["size"]) == config["buckets"]
    for name, every in (
        ("samples", "sample_steps"),
        ("evaluation", "eval_steps"),
        ("checkpoints", "checkpointing_steps"),
    ):
        assert (outline[name] == "none") == (config[every] == 0)
        assert config[every] == 0 or f"every {config[every]} steps" in outline[name]
    assert outline["seed"] == str(config["seed"]) and outline["folder"] == str(run.path)


def agrees_with_report(outline: dict[str, str], facts: RunFacts) -> None:
    learned, held_out = facts.summary["data"]["instance"], re.search(r"(\d+) held out", outline["images"])
    assert outline["images"].startswith(f"{learned} to learn")
    if facts.evaluation:
        assert held_out and dict(words.numbers(facts))["images"].startswith(f"{learned} + {held_out[1]} held out")
    for part in (outline["model"].partition(" (")[0], *outline["optimizer"].split(", ")[:1]):
        assert part in words.setup(facts)
    assert re.search(r"learning rate [\d.e-]+", outline["optimizer"])[0] in words.setup(facts)  # type: ignore[index]


def test_captions_of_their_own_are_counted(photos: Path, tmp_path: Path) -> None:
    flags = [*SHORT, *CASES["photos"], "--instance_data_dir", str(photos), "--output_dir", str(tmp_path / "run")]
    blanks = ["--instance_prompt", "a photo  of sks dog "]
    run = train_with([*flags, "--max_train_steps", "1", "--holdout", "0", *blanks])
    captions = json.loads(run.outline_file.read_text(encoding="utf-8"))["captions"]
    assert captions == (
        '2 of 6 images have their own, such as "caption 0"; the others are learned as "a photo of sks dog"'
    )


def test_what_becomes_of_captions_is_told_whoever_they_are_from(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(photos / "3.png", tmp_path / "photos")
    flags = [*SHORT, *OFF.split(), "--instance_data_dir", str(tmp_path / "photos"), "--instance_prompt", "sks, dog"]
    flags += ["--caption_dropout", "0.125", "--shuffle_tags", "--output_dir", str(tmp_path / "run")]
    captions = json.loads(train_with(flags).outline_file.read_text(encoding="utf-8"))["captions"]
    assert captions == (
        'none of their own: every image is learned as "sks, dog"; tags shuffled; left out 12.5 % of the time'
    )


def test_a_resumed_run_says_how_far_it_is(photos: Path, tmp_path: Path) -> None:
    flags = [*SHORT, *OFF.split(), "--checkpointing_steps", "1", "--lr_scheduler", "constant"]
    flags += ["--instance_data_dir", str(photos), "--instance_prompt", "a", "--output_dir", str(tmp_path / "run")]
    assert "done" not in json.loads(train_with(flags).outline_file.read_text(encoding="utf-8"))["steps"]
    run = train_with([*flags, "--max_train_steps", "3", "--resume_from_checkpoint", "latest"])
    steps = json.loads(run.outline_file.read_text(encoding="utf-8"))["steps"]
    assert steps.startswith("3, each of 4 images") and steps.endswith("; 2 are done")
