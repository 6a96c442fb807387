"""What Z-Image has of its own: Turbo told by its names, guidance from 0 on, captions without padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dreamlora.config import Model, Train
from dreamlora.errors import UserError
from dreamlora.families import z_image
from dreamlora.interfaces import ModelSource
from dreamlora.models import loading


@pytest.fixture(scope="module")
def model(tiny_folder) -> Path:
    return tiny_folder("z_image")


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


def linked(model: Path, folder: Path, *, shift: float, made_from: str | None = None) -> ModelSource:
    """The model's parts under another name, with another scheduler."""
    folder.mkdir(parents=True)
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(model / part)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    index |= {"_name_or_path": made_from} if made_from else {}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "scheduler").mkdir()
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    config = json.dumps({**scheduler, "shift": shift})
    (folder / "scheduler" / "scheduler_config.json").write_text(config, encoding="utf-8")
    return ModelSource(str(folder), "model")


@pytest.mark.parametrize(
    ("folder", "shift", "made_from", "turbo"),
    [
        ("Z-Image-Turbo", 6.0, None, True),
        ("my-turbo-finetune", 6.0, None, True),
        ("models--Tongyi-MAI--Z-Image-Turbo/snapshots/1234", 6.0, None, True),
        ("mine", 6.0, "Tongyi-MAI/Z-Image-Turbo", True),
        ("mode-turbo", 6.0, None, True),
        ("mine", 3.0, None, True),
        ("mine", 6.0, None, False),
        ("Z-Image-De-Turbo", 3.0, "Tongyi-MAI/Z-Image-Turbo", False),
        ("mine", 3.0, "ostris/Z-Image-DeTurbo", False),
        ("turbo/mine", 6.0, "Tongyi-MAI/Z-Image", False),
    ],
)
def test_turbo_is_told_by_names_then_by_the_shift(model, tmp_path, folder, shift, made_from, turbo):
    source = linked(model, tmp_path / folder, shift=shift, made_from=made_from)
    note = z_image.distilled(source)
    defaults = z_image.sample_defaults(source)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == ((9, 0.0) if turbo else (50, 5.0))
    if turbo:
        assert note is not None
        assert "Tongyi-MAI/Z-Image)" in note and "--training_adapter ostris/zimage_turbo_training_adapter" in note
    else:
        assert note is None


def test_any_guidance_above_zero_needs_a_negative_prompt(model):
    source = source_of(model)
    assert z_image.negative_prompt(source, 0.0, "blurry") is None
    assert z_image.negative_prompt(source, 0.5, None) == ""
    assert z_image.negative_prompt(source, 4.0, "blurry") == "blurry"


def test_times_are_drawn_with_the_schedulers_shift(model):
    scheduler = z_image.load(source_of(model), "scheduler", torch.float32)["scheduler"]
    halves = torch.full((1, 2), 0.5)
    drawn, plain = (
        z_image.objective(scheduler, train).draw_times(halves, (8, 8)).item()
        for train in (Train(), Train(timestep_shift="none"))
    )
    assert drawn == pytest.approx(6 * plain / (1 + 5 * plain)) and plain == pytest.approx(0.5, abs=2e-3)


@torch.no_grad()
def test_padding_of_a_batch_is_never_seen(model):
    """Whatever stands behind a caption."""
    denoiser = z_image.load(source_of(model), "denoiser", torch.float32)["transformer"]
    draw = torch.Generator().manual_seed(0)
    noisy, embeds = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 40, 16, generator=draw)
    mask = torch.arange(40)[None] < torch.tensor([[40], [7]])
    times = torch.tensor([0.3, 0.8])
    first, second = (
        z_image.predict(denoiser, noisy, times, {"prompt_embeds": some, "prompt_embeds_mask": mask.long()}, 1.0)
        for some in (embeds, embeds.masked_fill(~mask[..., None], 9.0))
    )
    assert torch.equal(first, second)


def test_what_cannot_be_is_refused(model):
    source = source_of(model)
    tokenizer = z_image.load(source, "text", torch.float32)["tokenizer"]
    with pytest.raises(UserError, match="--max_sequence_length must be at most 512 "):
        z_image.prompt_limit(tokenizer, 513)
    with pytest.raises(UserError, match="multiples of 16 pixels"):
        z_image.predict(torch.nn.Linear(1, 1), torch.zeros(1, 4, 8, 7), torch.zeros(1), {}, 1.0)


def test_a_strangers_template_is_not_run(model):
    """The stock pipeline writes chats with ours."""
    tokenizer = z_image.load(source_of(model), "text", torch.float32)["tokenizer"]
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert turn == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
