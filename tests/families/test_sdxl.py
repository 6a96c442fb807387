"""What Stable Diffusion XL has of its own: places and sizes, zeros for no negative prompt, a refiner that is no base
model, autoencoders with statistics of their channels.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.families import sdxl
from dreamlora.interfaces import Components, ModelSource, View
from dreamlora.models import loading


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return tiny_folder("sdxl")


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


def parts_of(source: ModelSource) -> Components:
    parts: Components = {}
    for role in sdxl.PARTS:
        parts |= sdxl.load(source, role, torch.float32)
    return parts


def changed(folder: Path, copy: Path, file: str, **values: object) -> Path:
    """A copy of the model with other values in a JSON file of it."""
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text(encoding="utf-8"))
    (copy / file).write_text(json.dumps(content | values), encoding="utf-8")
    return copy


def test_size_and_crop_have_their_places_in_time_ids():
    """Original size, top left of the crop, target size, each height first (arXiv 2307.01952, section 2.2)."""
    views = [View((640, 480), (7, 3), (96, 64)), View((10, 20), (0, 5), (32, 32))]
    found = sdxl.describe_views(views)["time_ids"]
    assert found.tolist() == [[480, 640, 3, 7, 64, 96], [20, 10, 5, 0, 32, 32]]


@torch.no_grad()
def test_the_denoiser_is_told_of_them(folder):
    unet = sdxl.load(source_of(folder), "denoiser", torch.float32)["unet"]
    draw = torch.Generator().manual_seed(0)
    noisy, prompt, pooled = (torch.randn(*shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 5, 32), (2, 16)))
    conditioning = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    whole, crop = View((16, 16), (0, 0), (16, 16)), View((64, 48), (9, 2), (16, 16))
    times = torch.tensor([500, 500])
    found = {
        views: sdxl.predict(unet, noisy, times, {**conditioning, **sdxl.describe_views(views)}, 1.0)
        for views in ((whole, whole), (whole, crop))
    }
    plain, other = found.values()
    assert torch.equal(plain[0], other[0]) and (plain[1] - other[1]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("given", [None, "", "a blurred one"])
def test_no_negative_prompt_is_zeros_where_the_model_says_so(folder, tmp_path, zeros, given):
    model = changed(folder, tmp_path / "model", "model_index.json", force_zeros_for_empty_prompt=zeros)
    source = source_of(model)
    negative = sdxl.negative_prompt(source, 5.0, given)
    assert negative == ((None if zeros else "") if given is None else given)
    parts = parts_of(source)

    def embeddings(prompt: str) -> dict[str, torch.Tensor]:
        return sdxl.encode_tokens(parts, sdxl.tokenize(parts, [prompt], None))

    stock = StableDiffusionXLPipeline.from_pretrained(model)
    asked = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent", **sdxl.call_options(5.0)}
    arguments = sdxl.call_arguments(embeddings("a cat"), None if negative is None else embeddings(negative))
    own = sdxl.pipeline({name: part for name, part in parts.items() if not name.startswith(("text", "tok"))})
    assert own.config.force_zeros_for_empty_prompt is zeros
    for pipeline in (stock, own):
        pipeline.set_progress_bar_config(disable=True)
    found = own(**arguments, **asked, generator=torch.Generator().manual_seed(3)).images
    expected = stock("a cat", negative_prompt=given, **asked, generator=torch.Generator().manual_seed(3)).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_latents_are_normalised_by_the_statistics_of_their_channels(folder, tmp_path):
    """As Playground's autoencoder has them; the stock pipeline for images as input does the same."""
    mean, std = [0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 4.0, 1.5]
    model = changed(folder, tmp_path / "model", "vae/config.json", latents_mean=mean, latents_std=std)
    parts = parts_of(source_of(model))
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = sdxl.encode_images(parts, pixels)
    stock = StableDiffusionXLImg2ImgPipeline.from_pretrained(model)
    expected = stock.prepare_latents(
        *(pixels, None, 1, 1, torch.float32, "cpu"), torch.Generator().manual_seed(2), add_noise=False
    )
    drawn = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found.mean + found.std * drawn, expected)


@pytest.mark.parametrize("name", [None, "sdxl"], ids=["", "--family"])
def test_the_refiner_is_refused_by_name(folder, tmp_path, name):
    model = changed(
        folder,
        tmp_path / "refiner",
        "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
        requires_aesthetics_score=True,
    )
    with pytest.raises(UserError, match=r"the refiner of Stable Diffusion XL, .* give the base model"):
        loading.family_of(source_of(model), name)
