"""What HiDream alone has: experts and packed outputs in training, a pipeline that scales sizes, distilled relatives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchLCMScheduler, HiDreamImageTransformer2DModel, UniPCMultistepScheduler

from dreamlora.config import Model, Train
from dreamlora.errors import UserError
from dreamlora.families import hidream
from dreamlora.interfaces import Conditioning, ModelSource
from dreamlora.models import loading
from tests.tinymodels.hidream import LENGTH, llama_tokenizer, save


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


@pytest.fixture(scope="module")
def source(tiny_folder) -> ModelSource:
    return source_of(tiny_folder("hidream"))


@pytest.fixture
def denoiser(source) -> torch.nn.Module:
    return hidream.load(source, "denoiser", torch.float32)["transformer"]


@pytest.fixture(scope="module")
def conditioning(source) -> Conditioning:
    text = hidream.load(source, "text", torch.float32)
    with torch.no_grad():
        return hidream.encode_tokens(text, hidream.tokenize(text, ["a cat", "two red dogs"], LENGTH))


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(1))


TIMES = torch.tensor([0.3, 0.8])


@pytest.mark.parametrize("sides", [(8, 8), (8, 12), (16, 8)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("forced", [False, True], ids=["", "force_inference_output"])
def test_the_model_predicts_the_same_in_training(denoiser, conditioning, sides, forced):
    """Then it gives patches instead of an image, unless its config says otherwise."""
    denoiser.register_to_config(force_inference_output=forced)
    with torch.no_grad():
        expected = hidream.predict(denoiser.eval(), noise(*sides), TIMES, conditioning, 1.0)
        found = hidream.predict(denoiser.train(), noise(*sides), TIMES, conditioning, 1.0)
    assert found.shape == (2, 4, *sides)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forced", [False, True], ids=["", "force_inference_output"])
def test_gradients_of_training_go_through_the_experts(denoiser, conditioning, forced):
    """Not so where the transformer acts as in inference, as diffusers' script has it."""
    denoiser.register_to_config(force_inference_output=forced)
    experts = [module for name, module in denoiser.named_modules() if name.endswith(".experts")]
    for module in denoiser.train().modules():
        module._force_inference_output = forced
    for parameter in (each for module in experts for each in module.parameters()):
        parameter.requires_grad_()
    prediction = hidream.predict(denoiser, noise(8, 8), TIMES, conditioning, 1.0)
    assert prediction.requires_grad is not forced
    if not forced:
        prediction.square().sum().backward()
        assert all(any(each.grad is not None for each in module.parameters()) for module in experts)


def test_images_that_are_not_square_have_a_largest_size(denoiser, conditioning):
    with torch.no_grad():
        hidream.predict(denoiser, noise(34, 34), TIMES, conditioning, 1.0)
    with pytest.raises(UserError, match=r"up to 256 patches .* latents of 34 x 32, which are 272"):
        hidream.predict(denoiser, noise(34, 32), TIMES, conditioning, 1.0)


def test_samples_have_the_area_that_the_stock_pipeline_scales_to(source, conditioning, monkeypatch):
    """Whatever size is asked for: this is why the resolution is the area's side."""
    still = lambda self, hidden_states, **_: (torch.zeros_like(hidden_states),)  # noqa: E731 (4096 tokens take seconds)
    monkeypatch.setattr(HiDreamImageTransformer2DModel, "forward", still)
    parts = {**hidream.load(source, "denoiser", torch.float32), **hidream.load(source, "vae", torch.float32)}
    pipeline = hidream.pipeline({**parts, **hidream.load(source, "scheduler", None)})
    pipeline.set_progress_bar_config(disable=True)
    one = {name: value[:1] for name, value in conditioning.items()}
    asked = {**hidream.call_arguments(one, None), **hidream.call_options(1.0), "height": 64, "width": 64}
    latents = pipeline(**asked, num_inference_steps=1, output_type="latent").images
    assert latents.shape == (1, 4, 128, 128)
    assert hidream.resolution(source) == 128 * pipeline.vae_scale_factor


@pytest.mark.parametrize(("shift", "steps"), [(6.0, 28), (3.0, 16)], ids=["Dev", "Fast"])
def test_distilled_relatives_are_known_by_their_scheduler(tmp_path, shift, steps):
    source = source_of(save(tmp_path / "hidream", scheduler=FlowMatchLCMScheduler(shift=shift)))
    defaults = hidream.sample_defaults(source)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (steps, 0.0)
    assert "train HiDream-I1-Full instead" in (hidream.distilled(source) or "")


def test_full_is_not_distilled(source):
    assert hidream.distilled(source) is None
    assert hidream.sample_defaults(source).guidance_scale == 5.0


def test_the_shift_of_training_is_the_samplers(tmp_path, source):
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    for own in (source, source_of(save(tmp_path / "solver", scheduler=solver))):
        scheduler = hidream.load(own, "scheduler", None)["scheduler"]
        middle = hidream.objective(scheduler, Train()).draw_times(torch.tensor([[0.5, 0.5]]), (8, 8))
        torch.testing.assert_close(middle, torch.tensor([0.75]), rtol=0, atol=1e-3)


def test_a_pipeline_without_llama_is_refused(tmp_path):
    """As the published ones are: it has another licence."""
    folder = save(tmp_path / "hidream")
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    del index["text_encoder_4"]
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match="has no 'text_encoder_4'"):
        loading.family_of(source_of(folder))


def test_the_stock_pipeline_pads_as_tokenize_does(source):
    """Llama has no token for padding of its own."""
    assert llama_tokenizer().pad_token is None
    stock = DiffusionPipeline.from_pretrained(source.path)
    tokens = hidream.tokenize(hidream.load(source, "text", None), ["a"], LENGTH)
    assert tokens["input_ids_4"].tolist() == [[0, tokens["input_ids_4"][0, 1], *[stock.tokenizer_4.pad_token_id] * 14]]


@torch.no_grad()
def test_clip_reads_218_tokens_of_a_long_prompt(source):
    """As the stock pipeline has it, more than the others of CLIP's."""
    text, prompt = hidream.load(source, "text", torch.float32), "a" * 300
    found = hidream.encode_tokens(text, hidream.tokenize(text, [prompt], 240))
    stock = DiffusionPipeline.from_pretrained(source.path)
    *_, pooled, _ = stock.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=240)
    torch.testing.assert_close(found["pooled_prompt_embeds"], pooled)
    assert hidream.tokenize(text, [prompt], 240)["input_ids"].shape == (1, 218)
