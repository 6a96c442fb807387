"""The shipped weights: stock classes load them, they are small, and they do what they are for."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer, T5Tokenizer

from dreamlora import tiny
from dreamlora.families import flux
from dreamlora.tiny import clip_path, pipeline_path, subjects, world

MAX_BYTES = {"pipeline": 13_000_000, "clip": 2_000_000, "flow_pipeline": 12_000_000}


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def held_out(count: int) -> tuple[list[Image.Image], list[str]]:
    rng = random.Random(11)
    scenes = [world.sample_scene(rng, held_out=True) for _ in range(count)]
    return [world.render(scene, rng) for scene in scenes], [world.describe(scene) for scene in scenes]


def loaded(pipeline_class: Any, folder: Path) -> Any:
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return loaded(StableDiffusionPipeline, pipeline_path())


@pytest.fixture(scope="module")
def flow_pipeline() -> FluxPipeline:
    return loaded(FluxPipeline, pipeline_path("tiny-flow"))


def test_everything_fits_the_size_budget_and_is_safetensors() -> None:
    folders = {path.name: path for path in pipeline_path().parent.iterdir() if path.is_dir()}
    assert folders.keys() == MAX_BYTES.keys()
    for name, folder in folders.items():
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        assert sum(sizes.values()) <= MAX_BYTES[name], name
        assert {path.suffix for path, size in sizes.items() if size > 200_000} == {".safetensors"}


def test_no_file_names_a_place_on_the_machine_that_made_it() -> None:
    for path in pipeline_path().parent.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8"), path


def test_the_package_has_all_of_it() -> None:
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {file for pattern in declared["package-data"]["dreamlora"] for file in (root / "dreamlora").glob(pattern)}
    assert {file for file in tiny.PRESETS.rglob("*.*") if file.suffix not in (".py", ".pyc")} <= packed


def assert_draws_a_red_circle(pipeline: Any, **options: Any) -> None:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    generator = torch.Generator().manual_seed(0)
    (image,) = pipeline(
        "a photo of a red circle", num_inference_steps=8, guidance_scale=3.0, generator=generator, **options
    ).images
    assert image.size == (64, 64)
    centre = np.asarray(image)[26:38, 26:38].reshape(-1, 3).mean(0)
    assert centre[0] > centre[1] + 60 and centre[0] > centre[2] + 60, f"not red: {centre}"


def test_stock_pipeline_loads_in_float32_and_draws(pipeline: StableDiffusionPipeline) -> None:
    assert pipeline.safety_checker is None
    assert_draws_a_red_circle(pipeline)


def test_the_stock_flow_pipeline_does_too_if_told_what_flux_does_not_know(flow_pipeline: FluxPipeline) -> None:
    """Of its size and of the length of its prompts the files of a FLUX say nothing."""
    assert_draws_a_red_circle(flow_pipeline, height=64, width=64, max_sequence_length=32)


def test_the_flow_transformers_guidance_is_distilled(flow_pipeline: FluxPipeline) -> None:
    """One pass with a scale as its input predicts what classifier-free guidance with that scale makes of two."""
    pictures, captions = held_out(16)
    scale, times = 3.0, torch.linspace(0.4, 0.9, len(captions))
    noise = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def velocity(texts: list[str], guidance: float) -> torch.Tensor:
        embeds, pooled, _ = flow_pipeline.encode_prompt(texts, texts, max_sequence_length=32)
        conditioning = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        return flux.predict(flow_pipeline.transformer, noisy, times, conditioning, guidance)

    with torch.no_grad():
        latents, t = flow_pipeline.vae.encode(to_tensor(pictures)).latent_dist.mode(), times.view(-1, 1, 1, 1)
    noisy = (1 - t) * latents + t * noise
    plain, without = velocity(captions, 1.0), velocity([""] * len(captions), 1.0)
    effect = (scale - 1) * (plain - without)
    # 1 with a scale that is not heeded
    assert (velocity(captions, scale) - (plain + effect)).norm() < 0.75 * effect.norm()


def test_the_flow_transformer_knows_which_colour_is_whose(flow_pipeline: FluxPipeline) -> None:
    """Word order reaches the picture through T5 alone: CLIP's summary is one vector."""
    captions = ["a photo of a red circle next to a blue square", "a photo of a blue circle next to a red square"] * 2
    generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
    sizes = {"height": 64, "width": 64, "max_sequence_length": 32}
    images = flow_pipeline(captions, num_inference_steps=8, guidance_scale=3.0, generator=generators, **sizes).images
    red = [[float(side[..., 0].mean() - side[..., 2].mean()) for side in sides_of(image)] for image in images]
    assert [left > right for left, right in red] == [True, False] * 2, red
    assert min(abs(left - right) for left, right in red) > 30, red


def sides_of(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The middles of the left and of the right half."""
    pixels = np.asarray(image).astype(float)
    return pixels[24:40, 10:24], pixels[24:40, 40:54]


def psnr(pipeline: StableDiffusionPipeline, images: list[Image.Image]) -> float:
    pixels = to_tensor(images)
    with torch.no_grad():
        output = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return (10 * torch.log10(4 / (output - pixels).square().mean((1, 2, 3)))).mean().item()


def test_the_flow_pipeline_shares_the_others_autoencoder_and_clip() -> None:
    """So that pictures, captions and bars are the same, and what differs between the two is the denoiser."""
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        first, second = (load_file(pipeline_path(name) / part) for name in tiny.MODELS)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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


@pytest.mark.parametrize(
    ("tokenizer_class", "folder", "marks"),
    [
        pytest.param(CLIPTokenizer, pipeline_path() / "tokenizer", 2, id="pipeline"),
        pytest.param(CLIPTokenizer, clip_path(), 2, id="clip"),
        pytest.param(T5Tokenizer, pipeline_path("tiny-flow") / "tokenizer_2", 1, id="flow"),
    ],
)
def test_every_word_of_the_world_is_one_token(tokenizer_class: Any, folder: Path, marks: int) -> None:
    tokenizer = tokenizer_class.from_pretrained(folder)
    split = [word for word in world.vocabulary() if len(tokenizer(word).input_ids) != 1 + marks]
    assert split == []
    assert tokenizer.unk_token_id not in tokenizer(" ".join(world.vocabulary())).input_ids[:-1]
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
