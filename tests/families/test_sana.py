"""What Sana alone has: an instruction before prompts but not before negative ones, a scheduler whose shift has another
name, images of any size, and a distilled relative.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from dreamlora.config import Data, Model, RunConfig, Train
from dreamlora.errors import UserError
from dreamlora.families import sana
from dreamlora.interfaces import Components, ModelSource
from dreamlora.models import loading, prompts
from dreamlora.run.context import RunContext
from dreamlora.training.stream import stack_conditioning
from tests.tinymodels.sana import INSTRUCTION, LENGTH, embeddings, save


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


@pytest.fixture(scope="module")
def source(tiny_folder) -> ModelSource:
    return source_of(tiny_folder("sana"))


@pytest.fixture(scope="module")
def text(source) -> Components:
    return sana.load(source, "text", torch.float32)


@pytest.fixture(scope="module")
def stock(source) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(source.path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encoded(text: Components, texts: list[str]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return sana.encode_tokens(text, sana.tokenize(text, texts, LENGTH))


def test_instruction_is_the_stock_pipelines():
    assert "\n".join(INSTRUCTION) == sana.INSTRUCTION


@torch.no_grad()
@pytest.mark.parametrize("given", [None, "", "a blurred one", "a" * 40])
def test_negative_prompts_are_encoded_without_the_instruction(source, text, stock, given):
    negative = sana.negative_prompt(source, 2.0, given)
    assert negative is not None
    found, expected = encoded(text, [negative]), embeddings(stock, [given or ""], instruction=None)
    length = min(1 + len(given or ""), LENGTH)  # the begin, and a token for each letter
    assert found["prompt_embeds"].shape[1] == length
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(found["prompt_embeds"], encoded(text, [given or ""])["prompt_embeds"])


def test_there_is_no_negative_prompt_without_guidance(source):
    assert sana.negative_prompt(source, 1.0, "a blurred one") is None


def test_captions_that_are_dropped_are_encoded_as_negative_prompts(source):
    """The model is guided away from what it learned without a caption."""
    config = RunConfig(data=Data(caption_dropout=0.9))
    plan = RunContext.caption_plan.fget(SimpleNamespace(config=config, family=sana, source=source))
    assert {plan.draw(["a cat"], place) for place in range(50)} == {"a cat", sana.negative_prompt(source, 2.0, None)}


def test_prompts_and_negative_ones_can_be_encoded_in_one_batch(source, text):
    texts = ["a cat", sana.negative_prompt(source, 2.0, "two red dogs") or "", ""]
    together = encoded(text, texts)
    alone = stack_conditioning([encoded(text, [each]) for each in texts], sana.LENGTH_AXES)
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("given", ["a", "many more words than there are in the prompt"])
def test_pictures_with_a_negative_prompt_are_the_stock_pipelines(source, text, stock, given):
    """Shorter and longer than the prompt."""
    how = {"num_inference_steps": 2, "height": 32, "width": 96, "output_type": "pt", **sana.call_options(3.0)}
    expected = stock("a red dog", negative_prompt=given, max_sequence_length=LENGTH, **how, generator=seeded()).images
    negative = encoded(text, [sana.negative_prompt(source, 3.0, given) or ""])
    arguments = sana.call_arguments(encoded(text, ["a red dog"]), negative)
    found = stock(**arguments, **how, generator=seeded()).images
    assert found.shape == (1, 3, 32, 96)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_the_instruction_does_not_count_as_a_part_of_a_prompt(source):
    texts = ["a" * 14, "a" * 15, "\0" + "a" * 15, "\0" + "a" * 16, "  A A  "]
    limit, cut = prompts.cut_prompts(sana, source, texts, LENGTH)
    assert limit == LENGTH
    assert list(cut) == [False, True, False, True, False]  # begin and last token of the instruction, or the begin


def test_too_long_prompts_are_refused():
    with pytest.raises(UserError, match=r"--max_sequence_length must be at most 4096 \(got 5000\)"):
        sana.prompt_limit(None, 5000)


@pytest.mark.parametrize("euler", [False, True], ids=["DPM solver", "Euler"])
def test_the_shift_of_training_is_the_samplers(tmp_path, euler):
    more = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)} if euler else {}
    scheduler = sana.load(source_of(save(tmp_path / "sana", **more)), "scheduler", None)["scheduler"]
    middle = sana.objective(scheduler, Train()).draw_times(torch.tensor([[0.5, 0.5]]), (8, 8))
    torch.testing.assert_close(middle, torch.tensor([0.75]), rtol=0, atol=1e-3)
    unshifted = sana.objective(scheduler, Train(timestep_shift="none")).draw_times(torch.tensor([[0.5, 0.5]]), (8, 8))
    torch.testing.assert_close(unshifted, torch.tensor([0.5]), rtol=0, atol=1e-3)


def test_times_are_logit_normal(source):
    """Before they are shifted."""
    scheduler = sana.load(source, "scheduler", None)["scheduler"]
    uniforms = torch.tensor([0.1, 0.5, 0.8])
    objective = sana.objective(scheduler, Train(timestep_shift="none"))
    found = objective.draw_times(uniforms[:, None].expand(-1, 2), (8, 8))
    torch.testing.assert_close(found, 1 - torch.sigmoid(torch.special.ndtri(uniforms)), rtol=0, atol=2e-3)


@torch.no_grad()
def test_the_denoisers_own_scale_of_times_is_heeded(source, text):
    denoiser, seen = sana.load(source, "denoiser", torch.float32)["transformer"], []
    denoiser.register_forward_pre_hook(lambda _, args, given: seen.append(given["timestep"]), with_kwargs=True)
    for scale in (1.0, 0.5):
        denoiser.register_to_config(timestep_scale=scale)
        sana.predict(denoiser, torch.zeros(1, 4, 8, 8), torch.tensor([0.6]), encoded(text, ["a"]), 1.0)
    assert [times.item() for times in seen] == pytest.approx([600, 300])


@pytest.mark.parametrize("name", [None, "sana"], ids=["", "--family"])
def test_sprint_is_refused(tmp_path, name):
    """It was distilled; --family alone does not make a Sana of it."""
    folder = save(tmp_path / "sprint")
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index |= {"_class_name": "SanaSprintPipeline", "scheduler": ["diffusers", "SCMScheduler"]}
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"is a Sana that was distilled .*: give Sana 1.0 or 1.5 \(model_index.json says SanaSprintPipeline\)",
    ):
        loading.family_of(source_of(folder), name)
