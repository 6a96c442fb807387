"""What Lumina 2 has of its own: negative prompts without the instruction, times that prefer noise, two names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dreamlora.config import Model, Train
from dreamlora.errors import UserError
from dreamlora.families import _chat, lumina2
from dreamlora.interfaces import Components, ModelSource
from dreamlora.models import loading


@pytest.fixture(scope="module")
def model(tiny_folder) -> Path:
    return tiny_folder("lumina2")


@pytest.fixture(scope="module")
def source(model) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(model)))


@pytest.fixture(scope="module")
def text(source) -> Components:
    return lumina2.load(source, "text", torch.float32)


@torch.no_grad()
def encoded(text: Components, prompts: list[str]) -> Any:
    return lumina2.encode_tokens(text, lumina2.tokenize(text, prompts, None))


def test_negative_prompts_are_read_without_the_instruction(model, source, text):
    negative = lumina2.negative_prompt(source, 4.0, "blurry")
    assert negative is not None
    found = encoded(text, [negative, lumina2.negative_prompt(source, 4.0, None) or ""])
    stock = diffusers.Lumina2Pipeline.from_pretrained(model)
    with torch.no_grad():
        _, _, embeds, mask = stock.encode_prompt(["a", "a"], negative_prompt=["blurry", ""])
    seen = mask[:, : found["prompt_embeds"].shape[1]]
    assert seen.sum(1).tolist() == mask.sum(1).tolist() == [7, 1]  # the begin and letters
    assert torch.equal(found["prompt_attention_mask"], seen)
    assert torch.equal(found["prompt_embeds"], embeds[:, : seen.shape[1]] * seen[..., None])
    assert lumina2.count_tokens(text["tokenizer"], [negative, "blurry"])[0] == 7
    assert lumina2.negative_prompt(source, 1.0, "blurry") is None


def test_negative_embeddings_of_the_call_are_as_long_as_the_others(source, text):
    prompts, unwanted = encoded(text, ["a cat"]), encoded(text, [_chat.NEGATIVE + "blurry"])
    arguments = lumina2.call_arguments(prompts, unwanted)
    assert arguments["prompt_embeds"].shape == arguments["negative_prompt_embeds"].shape
    assert arguments["negative_prompt_attention_mask"].sum() == unwanted["prompt_attention_mask"].sum() == 7
    assert not arguments["negative_prompt_embeds"][:, 7:].any()
    assert lumina2.call_arguments(prompts, None).keys() == prompts.keys()


def test_times_prefer_noise(source):
    """diffusers' script has it the other way round."""
    scheduler = lumina2.load(source, "scheduler", torch.float32)["scheduler"]
    spread = torch.linspace(0.01, 0.99, 99)[:, None].expand(-1, 2)
    objective = lumina2.objective(scheduler, Train())
    times = objective.draw_times(spread, (4, 4))
    assert times.median().item() == pytest.approx(6 / 7, abs=0.01)
    latents, noise = torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)
    assert objective.corrupt(latents, noise, torch.tensor([0.9])).mean().item() == pytest.approx(0.9)


def test_the_pipelines_older_name_is_known(model, tmp_path):
    """Older copies of the published model have it."""
    for part in model.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    renamed = json.dumps({**index, "_class_name": "Lumina2Text2ImgPipeline"})
    (tmp_path / "model_index.json").write_text(renamed, encoding="utf-8")
    assert loading.family_of(ModelSource(str(tmp_path), "old")) is lumina2


def test_what_cannot_be_is_refused(text):
    with pytest.raises(UserError, match="--max_sequence_length must be at most 256 "):
        lumina2.prompt_limit(text["tokenizer"], 257)
    with pytest.raises(UserError, match="multiples of 16 pixels"):
        lumina2.predict(torch.nn.Linear(1, 1), torch.zeros(1, 4, 8, 7), torch.zeros(1), {}, 1.0)
