"""FLUX.2: what [klein], distilled or not, and [dev] do differently, and the layers of their text encoders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline

from dreamlora.config import Lora, Model, Train
from dreamlora.errors import UserError
from dreamlora.families import flux2
from dreamlora.interfaces import Components, ModelSource
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.models.loading import resolve_source
from tests.tinymodels import flux2 as tiny


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "base": tiny_folder("flux2"),
        "distilled": tiny.save(tmp_path_factory.mktemp("models") / "distilled", is_distilled=True),
        "dev": tiny_folder("flux2-dev"),
    }


def source_of(folder: Path, *layers: int) -> ModelSource:
    return resolve_source(Model(pretrained_model_name_or_path=str(folder), text_encoder_out_layers=layers))


def load(source: ModelSource, role: Any) -> Components:
    return flux2.load(source, role, torch.float32)


def test_the_pipelines_class_and_settings_are_those_of_the_model(folders):
    made = {name: flux2.pipeline(load(source_of(folder), "scheduler")) for name, folder in folders.items()}
    assert [type(one) for one in made.values()] == [Flux2KleinPipeline, Flux2KleinPipeline, Flux2Pipeline]
    assert made["distilled"].config.is_distilled and not made["base"].config.is_distilled


def test_only_the_distilled_klein_is_told_of(folders):
    told = {name: flux2.distilled(source_of(folder)) for name, folder in folders.items()}
    assert told["base"] is told["dev"] is None
    assert "train its base model" in (told["distilled"] or "")
    defaults = {name: flux2.sample_defaults(source_of(folder)) for name, folder in folders.items()}
    assert {name: (one.num_inference_steps, one.guidance_scale) for name, one in defaults.items()} == {
        "base": (50, 4.0),
        "distilled": (4, 1.0),
        "dev": (50, 4.0),
    }


@pytest.mark.parametrize(
    ("name", "wanted"), [("base", ["", "x", None]), ("distilled", [None] * 3), ("dev", [None] * 3)]
)
def test_only_the_base_klein_needs_a_negative_prompt(folders, name, wanted):
    source = source_of(folders[name])
    assert [flux2.negative_prompt(source, *call) for call in ((4.0, None), (4.0, "x"), (1.0, "x"))] == wanted


def test_guidance_is_an_input_of_dev_alone(folders):
    noisy, times = torch.randn(1, 16, 2, 3), torch.tensor([0.4])
    prompt = {"prompt_embeds": torch.randn(1, 5, 48)}
    differs = {}
    for name in ("base", "dev"):
        transformer = load(source_of(folders[name]), "denoiser")["transformer"]
        low, high = (flux2.predict(transformer, noisy, times, prompt, guidance) for guidance in (1.0, 5.0))
        differs[name] = not torch.equal(low, high)
    assert differs == {"base": False, "dev": True}


@torch.no_grad()
@pytest.mark.parametrize(("name", "layers"), [("base", (10, 20, 28)), ("dev", (0, 9, 31))])
def test_other_layers_of_the_text_encoder_on_request(folders, name, layers):
    """Such as those of diffusers' [klein] script; what is cached of them is known by another name."""
    folder, length = folders[name], 256
    text = load(source_of(folder, *layers), "text")
    found = flux2.encode_tokens(text, flux2.tokenize(text, ["a cat"], length))["prompt_embeds"]
    stock = (Flux2Pipeline if name == "dev" else Flux2KleinPipeline).from_pretrained(folder)
    expected, _ = stock.encode_prompt(["a cat"], max_sequence_length=length, text_encoder_out_layers=layers)
    usual, _ = stock.encode_prompt(["a cat"], max_sequence_length=length)
    assert torch.equal(found, expected) and not torch.equal(found, usual)
    assert source_of(folder, *layers).model_id not in (source_of(folder).model_id, source_of(folder, 0, 1, 2).model_id)


@pytest.mark.parametrize("layers", [(9, 18), (9, 18, 29), (9, 18, 27, 28)])
def test_layers_that_the_text_encoder_has_not_are_refused(folders, layers):
    given = " ".join(map(str, layers))
    with pytest.raises(
        UserError, match=rf"must be 3 layers from 0 to 28, .* \(got {given}\); left out, they are 9 18 27"
    ):
        load(source_of(folders["base"], *layers), "text")
    with pytest.raises(UserError, match="--text_encoder_out_layers must be at least 0"):
        Model(text_encoder_out_layers=(-1, 2, 3))


@torch.no_grad()
def test_the_token_of_an_image_is_taken_out_of_prompts(folders):
    """As the pipeline of [dev] does it; there is no image."""
    text = load(source_of(folders["dev"]), "text")
    plain, marked = (flux2.tokenize(text, [prompt], 256)["input_ids"] for prompt in ("a cat", "a [IMG]cat"))
    assert torch.equal(plain, marked)


def test_times_are_logit_normal_and_shifted_by_the_number_of_tokens(folders):
    """A token is one place of the latents; at 64 x 64 of them, 1024 pixels, the shift is e^1.15."""
    scheduler = load(source_of(folders["base"]), "scheduler")["scheduler"]
    uniforms = torch.tensor([0.1, 0.5, 0.8])[:, None].expand(-1, 2)
    for sides, mu in (((16, 16), 0.5), ((64, 64), 1.15)):
        found = flux2.objective(scheduler, Train()).draw_times(uniforms, sides)
        plain = 1 - torch.sigmoid(torch.special.ndtri(uniforms[:, 0].double()))  # the grid falls from 1
        shifted = math.exp(mu) * plain / (1 + (math.exp(mu) - 1) * plain)
        torch.testing.assert_close(found.double(), shifted, rtol=0, atol=2e-3)
    script = flux2.objective(scheduler, Train(timestep_sampling="uniform", timestep_shift="none"))
    torch.testing.assert_close(script.draw_times(uniforms, (64, 64)), 1 - uniforms[:, 0], rtol=0, atol=2e-3)


def test_a_lora_adapts_the_images_attention_and_the_single_blocks(folders):
    transformer = load(source_of(folders["base"]), "denoiser")["transformer"]
    add_lora(transformer, Lora(rank=2), flux2.LORA_LAYERS)
    adapted = {name.split(".lora_")[0] for name in trainable_parameters(transformer)}
    assert adapted == {
        *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"single_transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in ("to_qkv_mlp_proj", "to_out")),
    }
