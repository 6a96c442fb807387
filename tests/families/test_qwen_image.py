"""Qwen-Image: its template, its masks, its two streams, images behind the noisy one, times, and odd autoencoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from PIL import Image

from dreamlora.config import Lora, Model, Train
from dreamlora.errors import UserError
from dreamlora.families import _qwen_edit, qwen_image
from dreamlora.families._qwen_prompt import AFTER, BEFORE, DROPPED
from dreamlora.interfaces import PICTURE, Components, Conditioning, ModelSource
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.models import loading
from dreamlora.sampling.sampler import SamplePlan, draw
from tests.hostile import edit_json
from tests.tinymodels.qwen_image import VARIANTS, save

TIMES = torch.tensor([0.3, 0.8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "qwen", shift_terminal=0.02)


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


@pytest.fixture(scope="module")
def parts(folder: Path) -> Components:
    loaded: Components = {}
    for role in ("text", "vae", "denoiser", "scheduler"):
        loaded |= qwen_image.load(source_of(folder), role, torch.float32)
    return loaded


def encoded(parts: Components, *prompts: str) -> Conditioning:
    with torch.no_grad():
        return qwen_image.encode_tokens(parts, qwen_image.tokenize(parts, prompts, None))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def test_the_template_is_the_pipelines(folder: Path, parts: Components) -> None:
    stock = diffusers.QwenImagePipeline.from_pretrained(folder)
    assert stock.prompt_template_encode == BEFORE + "{}" + AFTER
    assert stock.prompt_template_encode_start_idx == DROPPED
    assert len(parts["tokenizer"](BEFORE).input_ids) == DROPPED
    assert stock.tokenizer_max_length == qwen_image.LONGEST_PROMPT


def test_braces_in_a_prompt_are_braces(parts: Components) -> None:
    assert qwen_image.count_tokens(parts["tokenizer"], ["", "{}{0}"]) == [5, 10]


def test_more_tokens_than_the_pipeline_takes_are_refused(parts: Components) -> None:
    assert qwen_image.prompt_limit(parts["tokenizer"], 1024) == 1024
    with pytest.raises(UserError, match="--max_sequence_length must be at most 1024"):
        qwen_image.prompt_limit(parts["tokenizer"], 1025)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_count(parts: Components) -> None:
    conditioning = encoded(parts, "a", "two red dogs")
    noisy = noise(2, 4, 8, 8)
    before = qwen_image.predict(parts["transformer"], noisy, TIMES, conditioning, 1.0)
    pads = conditioning["prompt_embeds_mask"] == 0
    assert pads.sum() == len("two red dogs") - 1
    conditioning["prompt_embeds"][pads] = 50.0
    torch.testing.assert_close(qwen_image.predict(parts["transformer"], noisy, TIMES, conditioning, 1.0), before)


def test_both_streams_are_adapted(folder: Path) -> None:
    [denoiser] = [qwen_image.load(source_of(folder), "denoiser", torch.float32)["transformer"]]
    add_lora(denoiser, Lora(rank=2), qwen_image.LORA_LAYERS)
    of_second_block = {
        name.removeprefix("transformer_blocks.1.").partition(".lora_A")[0]
        for name in trainable_parameters(denoiser)
        if "blocks.1" in name and "lora_A" in name
    }
    assert of_second_block == set(qwen_image.LORA_LAYERS)
    assert not any(name.startswith(("img_in", "txt_in", "proj_out")) for name in trainable_parameters(denoiser))


@torch.no_grad()
def test_images_behind_the_noisy_one_are_seen_and_not_predicted(parts: Components) -> None:
    """What models that edit images are shown; each has a place of its own, and a size."""
    conditioning, noisy = encoded(parts, "a cat", "a dog"), noise(2, 4, 8, 6)
    shown = noise(2, 4, 4, 10)
    seen: list[dict[str, Any]] = []
    handle = parts["transformer"].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    alone = qwen_image.velocity(parts["transformer"], [noisy], TIMES, conditioning)
    found = qwen_image.velocity(parts["transformer"], [noisy, shown], TIMES, conditioning)
    other = qwen_image.velocity(parts["transformer"], [noisy, -shown], TIMES, conditioning)
    handle.remove()
    assert seen[1]["img_shapes"] == [[(1, 4, 3), (1, 2, 5)]] * 2
    assert torch.equal(seen[1]["hidden_states"][:, :12], seen[0]["hidden_states"])
    assert found.shape == noisy.shape
    assert (found - alone).abs().max() > 1e-4
    assert (found - other).abs().max() > 1e-4


def test_sides_that_make_no_patches_are_refused(parts: Components) -> None:
    with pytest.raises(UserError, match=r"multiples of 16 pixels \(got latents of 7 x 8\)"):
        qwen_image.predict(parts["transformer"], noise(1, 4, 7, 8), TIMES[:1], encoded(parts, "a"), 1.0)


@pytest.mark.parametrize("sides", [(8, 8), (128, 128), (96, 160)])
def test_times_are_shifted_as_the_pipeline_does_it(parts: Components, sides: tuple[int, int]) -> None:
    """At a grid's places, so that both have the same least sigma."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(parts["scheduler"].config)
    config = scheduler.config
    tokens = sides[0] * sides[1] // 4
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    grid = torch.linspace(1.0, 0.001, 1000)
    scheduler.set_timesteps(sigmas=grid.tolist(), mu=mu)
    objective = qwen_image.objective(parts["scheduler"], Train())
    uniforms = (torch.arange(1000)[:, None].expand(-1, 2) + 0.5) / 1000
    found = objective.draw_times(uniforms, sides)
    torch.testing.assert_close(found, scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)
    assert found.min() == pytest.approx(config.shift_terminal)


def test_guidance_needs_a_negative_prompt(folder: Path) -> None:
    source = source_of(folder)
    own = qwen_image.sample_defaults(source)
    assert qwen_image.negative_prompt(source, own.guidance_scale, own.negative_prompt) == " "
    assert qwen_image.negative_prompt(source, 4.0, "blurry") == "blurry"
    assert qwen_image.negative_prompt(source, 1.0, "blurry") is None
    assert qwen_image.negative_prompt(source, 4.0, None) is None


def test_one_step_is_none_for_such_a_scheduler(parts: Components) -> None:
    """The stock pipeline would divide by zero."""
    plan = SamplePlan(("a cat",), num_inference_steps=1, guidance_scale=1.0, width=16, height=16)
    with pytest.raises(UserError, match=r"--num_inference_steps 1: .* 2 steps or more"):
        list(draw(qwen_image.pipeline(parts), plan, lambda prompts: {"prompt": prompts}))


@pytest.mark.parametrize("name", ["latents_mean", "latents_std"])
def test_statistics_that_are_not_of_the_channels_are_told(folder: Path, tmp_path: Path, name: str) -> None:
    odd = with_vae(folder, tmp_path, **{name: [1.0] * 3})
    vae = qwen_image.load(source_of(odd), "vae", torch.float32)
    with pytest.raises(UserError, match=f"3 numbers as {name}, where one for each of its 4 channels"):
        qwen_image.encode_images(vae, noise(1, 3, 16, 16))


@pytest.mark.parametrize("steps", [None, [], [True] * 40])
def test_an_autoencoder_without_downsamplings_is_told(folder: Path, tmp_path: Path, steps: Any) -> None:
    odd = with_vae(folder, tmp_path, temperal_downsample=steps)
    with pytest.raises(UserError, match="no list of downsamplings"):
        qwen_image.resolution(source_of(odd))


def with_vae(folder: Path, tmp_path: Path, **settings: Any) -> Path:
    """The model with another config of its autoencoder."""
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    file = odd / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    return odd


@pytest.fixture(scope="module", params=["edit", "edit_plus"])
def edit_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return VARIANTS[request.param].save(tmp_path_factory.mktemp("models") / request.param)


def test_the_template_around_the_image_is_the_pipelines(edit_folder: Path) -> None:
    stock = VARIANTS["edit"].stock(edit_folder)
    system, rest = stock.prompt_template_encode.split("user\n")
    plus = isinstance(stock, diffusers.QwenImageEditPlusPipeline)
    before = _qwen_edit.BEFORE[type(stock).__name__]
    assert (
        before + AFTER
        == f"{system}user\n{'Picture 1: <|vision_start|><|image_pad|><|vision_end|>' * plus}{rest}".replace("{}", "")
    )
    assert stock.prompt_template_encode_start_idx == _qwen_edit.DROPPED
    assert len(stock.tokenizer(system + "user\n").input_ids) == _qwen_edit.DROPPED


def test_what_is_edited_has_an_area_of_its_own(edit_folder: Path) -> None:
    """Whatever the size of the image that is drawn, as in the pipelines."""
    image = Image.new("RGB", (60, 30), (0, 128, 255))
    picture = qwen_image.text_pictures(source_of(edit_folder))
    assert picture is not None
    plus = "Plus" in json.loads((edit_folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    assert picture(image).shape == ((3, 256, 544) if plus else (3, 736, 1440))
    assert picture(image).dtype == torch.uint8 and picture(image)[:, 0, 0].tolist() == [0, 128, 255]
    pixels = torch.tensor([-1.0, 1 / 255, 1.0])[None, :, None, None].expand(1, 3, 30, 60)
    prepared = _qwen_edit.prepared(pixels)
    assert prepared.shape == (1, 3, 736, 1440)
    torch.testing.assert_close(prepared[:, :, 0, 0], pixels[:, :, 0, 0])


def test_a_prompt_has_as_many_tokens_more_as_its_image(edit_folder: Path) -> None:
    text = qwen_image.load(source_of(edit_folder), "text", torch.float32)
    tokens = qwen_image.tokenize(text, ["a cat", "a dog on a hill"], None)
    pictures = torch.zeros(2, 3, 56, 84, dtype=torch.uint8)
    pictures[1] = 255
    patches = _qwen_edit.with_patches(text, {**tokens, PICTURE: pictures})
    place = text["text_encoder"].config.image_token_id
    assert (patches["input_ids"] == place).sum(dim=1).tolist() == [2 * 3, 2 * 3]
    assert patches["image_grid_thw"].tolist() == [[1, 4, 6]] * 2 and len(patches["pixel_values"]) == 2 * 4 * 6
    assert patches["attention_mask"].sum(dim=1).tolist() == (tokens["attention_mask"].sum(dim=1) + 5).tolist()
    words = text["processor"](
        text=[_qwen_edit.BEFORE["QwenImageEditPipeline"]],
        images=Image.new("RGB", (84, 56)),
        padding=True,
        return_tensors="pt",
    )
    assert (words["input_ids"] == place).sum() == 2 * 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patch_size": 16}, "patch_size 16, but the text encoder expects 14"),
        ({"merge_size": 4}, "merge_size 4, but the text encoder expects 2"),
        ({"patch_size": "14"}, "patch_size"),
        ({"size": {"shortest_edge": 0, "longest_edge": 9}}, "size.shortest_edge"),
        ({"image_mean": [0.5]}, "image_mean"),
    ],
)
def test_a_processor_that_does_not_fit_is_told(edit_folder: Path, tmp_path: Path, settings: Any, words: str) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(edit_folder, odd)
    edit_json(odd / "processor" / "preprocessor_config.json", **settings)
    with pytest.raises(UserError, match=words):
        qwen_image.load(source_of(odd), "text", torch.float32)
    (odd / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        qwen_image.load(source_of(odd), "text", torch.float32)
