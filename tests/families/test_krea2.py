"""Krea 2: its template and layers, what is padded, guidance, Turbo, and settings that do not belong to the parts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dreamlora.config import Model, Train
from dreamlora.errors import UserError
from dreamlora.families import krea2
from dreamlora.families._qwen_prompt import AFTER, BEFORE, DROPPED, END
from dreamlora.interfaces import Components, Conditioning, ModelSource
from dreamlora.models import loading
from tests.tinymodels.krea2 import save

TIMES = torch.tensor([0.3, 0.8])


@pytest.fixture(scope="module")
def folder(tiny_folder) -> Path:
    return tiny_folder("krea2")


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


@pytest.fixture(scope="module")
def parts(folder: Path) -> Components:
    loaded: Components = {}
    for role in ("text", "vae", "denoiser", "scheduler"):
        loaded |= krea2.load(source_of(folder), role, torch.float32)
    return loaded


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return diffusers.Krea2Pipeline.from_pretrained(folder)


def encoded(parts: Components, *prompts: str) -> Conditioning:
    with torch.no_grad():
        return krea2.encode_tokens(parts, krea2.tokenize(parts, prompts, None))


def test_template_and_layers_are_the_pipelines(stock: Any, parts: Components) -> None:
    assert stock.prompt_template_encode_prefix == BEFORE
    assert stock.prompt_template_encode_suffix == AFTER
    assert stock.prompt_template_encode_start_idx == DROPPED
    assert stock.prompt_template_encode_num_suffix_tokens == END
    assert len(parts["tokenizer"](AFTER).input_ids) == END
    modules = {name: part for name, part in parts.items() if name != "settings"}
    assert diffusers.Krea2Pipeline(**modules).text_encoder_select_layers == krea2.TAPS


def test_states_of_all_layers_are_kept_for_the_prompts_own_tokens(parts: Components) -> None:
    """The real model's at its full length take 31 megabytes."""
    found = encoded(parts, "a cat")
    assert found["prompt_embeds"].shape == (1, len("a cat") + END, 3, 16)
    assert found["prompt_embeds_mask"].all()


@torch.no_grad()
def test_the_pipelines_padding_changes_nothing(parts: Components, stock: Any) -> None:
    """It pads to the full length, in the middle of the template; here there is no padding at all."""
    states, mask = stock.encode_prompt(["a", "two red dogs"], max_sequence_length=64)
    noisy = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    padded = {"prompt_embeds": states, "prompt_embeds_mask": mask}
    expected = krea2.predict(parts["transformer"], noisy, TIMES, padded, 1.0)
    for number, prompt in enumerate(["a", "two red dogs"]):
        own = slice(number, number + 1)
        found = krea2.predict(parts["transformer"], noisy[own], TIMES[own], encoded(parts, prompt), 1.0)
        torch.testing.assert_close(found, expected[own], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_count(parts: Components) -> None:
    conditioning = encoded(parts, "a", "two red dogs")
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = krea2.predict(parts["transformer"], noisy, TIMES, conditioning, 1.0)
    conditioning["prompt_embeds"][conditioning["prompt_embeds_mask"] == 0] = 50.0
    torch.testing.assert_close(krea2.predict(parts["transformer"], noisy, TIMES, conditioning, 1.0), before)


def test_a_prompt_that_is_cut_keeps_the_templates_end(parts: Components) -> None:
    tokens = krea2.tokenize(parts, ["a" * 100, "b"], 24)
    end = parts["tokenizer"](AFTER).input_ids
    assert tokens["input_ids"].shape == (2, DROPPED + 24)
    assert tokens["input_ids"][0, -END:].tolist() == end
    assert tokens["attention_mask"].sum(1).tolist() == [DROPPED + 24, DROPPED + 1 + END]
    with pytest.raises(UserError, match="--max_sequence_length must be more than 5"):
        krea2.tokenize(parts, ["a"], 5)


@pytest.mark.parametrize("lengths", [("a", "a long one"), ("a long one", "a")])
def test_positive_and_negative_embeddings_are_of_one_length(parts: Components, lengths: tuple[str, str]) -> None:
    arguments = krea2.call_arguments(*(encoded(parts, prompt) for prompt in lengths))
    assert {value.shape[1] for value in arguments.values()} == {len("a long one") + END}
    assert arguments["negative_prompt_embeds_mask"].sum() == len(lengths[1]) + END
    assert arguments["prompt_embeds_mask"].dtype == arguments["negative_prompt_embeds_mask"].dtype == torch.bool


def test_guidance_is_on_above_zero(folder: Path) -> None:
    source = source_of(folder)
    assert krea2.negative_prompt(source, 0.0, "blurry") is None
    assert krea2.negative_prompt(source, 0.5, None) == ""
    assert krea2.negative_prompt(source, 0.5, "blurry") == "blurry"


def test_turbo_is_told_by_its_settings(folder: Path, tmp_path: Path) -> None:
    turbo = source_of(save(tmp_path / "any", is_distilled=True))
    assert krea2.distilled(source_of(folder)) is None
    assert "krea/Krea-2-Raw" in (krea2.distilled(turbo) or "")
    found = [krea2.sample_defaults(source) for source in (source_of(folder), turbo)]
    assert [(each.num_inference_steps, each.guidance_scale) for each in found] == [(28, 4.5), (8, 0.0)]
    drawing = krea2.pipeline(krea2.load(turbo, "denoiser", torch.float32))
    assert drawing.config.is_distilled and drawing.text_encoder_select_layers == (0, 1, 3)


def test_times_are_shifted_by_the_number_of_tokens(parts: Components) -> None:
    objective = krea2.objective(parts["scheduler"], Train())
    [found] = objective.draw_times(torch.tensor([[0.5, 0.5]]), (128, 128))
    mu = 0.5 + (1.15 - 0.5) * (64 * 64 - 256) / (6400 - 256)
    assert found.item() == pytest.approx(math.exp(mu) / (1 + math.exp(mu)), abs=1e-3)
    [plain] = krea2.objective(parts["scheduler"], Train(timestep_shift="none")).draw_times(
        torch.tensor([[0.5, 0.5]]), (128, 128)
    )
    assert plain.item() == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"text_encoder_select_layers": [0, 1]}, r"\[0, 1\], where 3 of the 3 layers"),
        ({"text_encoder_select_layers": [0, 1, 4]}, r"\[0, 1, 4\]"),
        ({"text_encoder_select_layers": [0, 1, -5]}, r"\[0, 1, -5\]"),
        ({"text_encoder_select_layers": [0, 1, 1.5]}, r"\[0, 1, 1.5\]"),
        ({"text_encoder_select_layers": None}, "they do not belong together"),
        ({"text_encoder_select_layers": "all"}, r"text_encoder_select_layers: expected .* \(got 'all'\)"),
        ({"patch_size": 4}, "patch_size: 4, where 2 is expected"),
        ({"is_distilled": "yes"}, r"is_distilled: expected .* \(got 'yes'\)"),
    ],
)
def test_settings_that_do_not_belong_to_the_parts_are_told(
    folder: Path, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    file = odd / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    with pytest.raises(UserError, match=told):
        krea2.load(source_of(odd), "text", torch.float32)


def test_layers_may_be_counted_from_the_last(folder: Path, tmp_path: Path, parts: Components) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    file = other / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8")) | {"text_encoder_select_layers": [-4, 1, -1]}
    file.write_text(json.dumps(index), encoding="utf-8")
    found = encoded(krea2.load(source_of(other), "text", torch.float32), "a")
    assert torch.equal(found["prompt_embeds"], encoded(parts, "a")["prompt_embeds"])
