"""The shipped weights: stock classes load them, they are small, and they do what they are for."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

from dreamlora.tiny import clip_path, pipeline_path, subjects, world

MAX_BYTES = 16_000_000


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def held_out(count: int) -> tuple[list[Image.Image], list[str]]:
    rng = random.Random(11)
    scenes = [world.sample_scene(rng, held_out=True) for _ in range(count)]
    return [world.render(scene, rng) for scene in scenes], [world.describe(scene) for scene in scenes]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_everything_fits_the_size_budget_and_is_safetensors() -> None:
    files = [path for path in pipeline_path().parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files if path.stat().st_size > 200_000} == {".safetensors"}


def test_stock_pipeline_loads_in_float32_and_draws(pipeline: StableDiffusionPipeline) -> None:
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert pipeline.safety_checker is None
    generator = torch.Generator().manual_seed(0)
    (image,) = pipeline(
        "a photo of a red circle", num_inference_steps=8, guidance_scale=3.0, generator=generator
    ).images
    assert image.size == (64, 64)
    centre = np.asarray(image)[26:38, 26:38].reshape(-1, 3).mean(0)
    assert centre[0] > centre[1] + 60 and centre[0] > centre[2] + 60, f"not red: {centre}"


def psnr(pipeline: StableDiffusionPipeline, images: list[Image.Image]) -> float:
    pixels = to_tensor(images)
    with torch.no_grad():
        output = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (output - pixels).square().mean((1, 2, 3)))).mean().item()


def test_autoencoder_keeps_held_out_pictures_and_subjects(pipeline: StableDiffusionPipeline) -> None:
    assert psnr(pipeline, held_out(32)[0]) >= 28.0
    figures = [subjects.render(name, i, "holdout")[0] for name in subjects.SUBJECTS for i in range(8)]
    assert psnr(pipeline, figures) >= 24.0


def test_latents_are_standardised(pipeline: StableDiffusionPipeline) -> None:
    assert pipeline.vae.config.scaling_factor == 1.0
    with torch.no_grad():
        posterior = pipeline.vae.encode(to_tensor(held_out(64)[0])).latent_dist
    assert posterior.std.max() < 1e-3, "encoding must not add noise"
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 0.15
    assert (posterior.mean.std((0, 2, 3)) - 1).abs().max() < 0.15


@pytest.mark.parametrize("folder", [pipeline_path() / "tokenizer", clip_path()], ids=["pipeline", "clip"])
def test_every_word_of_the_world_is_one_token(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    split = [word for word in world.vocabulary() if len(tokenizer(word).input_ids) != 3]
    assert split == []
    assert "sks" in world.vocabulary()
    rng = random.Random(0)
    longest = max((world.describe(world.sample_pair(rng)) for _ in range(200)), key=len)
    assert len(tokenizer(longest).input_ids) < tokenizer.model_max_length


def test_clip_finds_the_caption_of_a_picture() -> None:
    model = CLIPModel.from_pretrained(clip_path()).eval()
    tokenizer, processor = (kind.from_pretrained(clip_path()) for kind in (CLIPTokenizer, AutoImageProcessor))
    images, captions = held_out(64)
    tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    pixels = processor(images, return_tensors="pt").pixel_values
    assert torch.allclose(pixels, to_tensor(images), atol=1e-5)
    with torch.no_grad():
        best = model(input_ids=tokens, pixel_values=pixels).logits_per_image.argmax(1).tolist()
    assert np.mean([captions[found] == caption for found, caption in zip(best, captions, strict=True)]) >= 0.85
