"""A complete run of the embedded flow transformer, by its preset but shorter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from dreamlora import tiny
from tests.training.conftest import train_with
from tests.training.test_run import same, weights

SHORT = (
    "--pretrained_model_name_or_path tiny-flow --max_train_steps 4 --train_batch_size 2 --num_class_images 2 "
    "--num_inference_steps 2 --sample_steps 4 --checkpointing_steps 2 --eval_steps 0 --final_eval_items 0"
)
pytestmark = pytest.mark.usefixtures("no_report")


def test_a_run_by_the_preset_draws_in_a_stock_pipeline_and_resumes_to_the_bit(cache: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of {}\n", encoding="utf-8")
    flags = [*SHORT.split(), "--sample_prompts", str(prompts), "--latents_cache_dir", str(cache), "--output_dir"]
    run = train_with([*flags, str(tmp_path / "run")])
    config = run.config()
    assert len(list((tmp_path / "class_images").rglob("*.png"))) == 2
    assert {row["encoder_id"].partition("@")[0] for row in run.metrics() if "encoder_id" in row} == {"tiny"}
    pipeline = FluxPipeline.from_pretrained(tiny.pipeline_path("tiny-flow"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run.path)
    drawn = pipeline(
        "a photo of sks creature",
        num_inference_steps=2,
        guidance_scale=config["sample_guidance_scale"],
        max_sequence_length=config["max_sequence_length"],
        generator=torch.Generator().manual_seed(42),
        height=64,
        width=64,
    ).images[0]
    first, last = (
        np.asarray(Image.open(next(run.sample_dir(step).glob("*.png"))).convert("RGB"), np.int16) for step in (0, 4)
    )
    assert np.abs(np.asarray(drawn, np.int16) - last).max() <= 1
    assert np.abs(first - last).max() > 1, "the LoRA changes what is drawn"

    resumed = train_with([*flags, str(tmp_path / "other"), "--resume_from_checkpoint", str(run.checkpoint_dir(2))])
    assert same(weights(run), weights(resumed))
