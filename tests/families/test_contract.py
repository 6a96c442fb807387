"""Every family keeps the contract: same numbers as the stock pipeline of small models of its real classes."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dreamlora import registry
from dreamlora.config import Lora, Model, Train
from dreamlora.data.shown_prompts import tokenized, with_pictures
from dreamlora.data.transforms import to_tensor
from dreamlora.interfaces import PICTURE, Components, Conditioning, Family, ModelSource, View
from dreamlora.lora.applying import apply_lora
from dreamlora.lora.formats import FileContent, kohya
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.names import names_of
from dreamlora.lora.saving import save_lora, weights_of
from dreamlora.lora.targets import layer_names, wanted_layers
from dreamlora.models import loading, prompts
from dreamlora.models.tokenizer import PROCESSORS
from dreamlora.objectives import squared_errors
from dreamlora.training.stream import stack_conditioning
from tests import tinymodels

PROMPTS = ["a cat", "two red dogs"]
ODD_PROMPTS = ["", "eine Katze, größer", "猫の写真", "a 🐈", "UPPER case, (weights:1.3)"]
ROLES = ("text", "vae", "denoiser", "scheduler")


@pytest.fixture(scope="module", params=tinymodels.SAVERS)
def case(request, tiny_folder, small_areas) -> SimpleNamespace:
    """A family with its source, its parts and a stock pipeline to compare with."""
    tiny, folder = tinymodels.of(request.param), tiny_folder(request.param)
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))
    family = loading.family_of(source)
    name = request.param.partition("-")[0]
    options = {"safety_checker": None} if name == "sd" else {}
    stock = tiny.stock(folder, **options)
    return SimpleNamespace(
        **{"name": name, "tiny": tiny, "folder": folder, "source": source, "family": family},
        **{"parts": parts_of(family, source), "stock": stock},
    )


def parts_of(family: Family, source: ModelSource) -> Components:
    parts: Components = {}
    for role in ROLES:
        parts |= family.load(source, role, torch.float32)
    return parts


@pytest.fixture
def parts(case) -> Components:
    """To be trained: copies, in a third of the time of loading them."""
    return copy.deepcopy(case.parts)


def fresh_stock(case) -> Any:
    """To load adapters into."""
    return copy.deepcopy(case.stock)


def as_prompts(case, prompts: list[str], guidance_scale: float = 1.0) -> dict[str, Any]:
    """What a user of the stock pipeline gives it."""
    # a copy: some pipelines write what they make of prompts into the list
    arguments = {"prompt": [*prompts], **case.tiny.call, **case.family.call_options(guidance_scale)}
    negative = case.family.sample_defaults(case.source).negative_prompt
    return arguments if negative is None else {**arguments, "negative_prompt": [negative] * len(prompts)}


def as_embeddings(case, parts: Components, prompts: list[str], guidance_scale: float = 1.0) -> dict[str, Any]:
    """What samples are drawn with."""
    own = case.family.sample_defaults(case.source).negative_prompt
    negative = case.family.negative_prompt(case.source, guidance_scale, own)
    unwanted = None if negative is None else encoded(case, parts, [negative] * len(prompts))
    arguments = case.family.call_arguments(encoded(case, parts, prompts), unwanted)
    return {**arguments, **case.family.call_options(guidance_scale)}


@torch.no_grad()  # attention's kernels with and without gradients round differently
def encoded(case, parts: Components, prompts: list[str]) -> Conditioning:
    return case.family.encode_tokens(parts, tokens_of(case, parts, prompts))


def tokens_of(case, parts: Components, prompts: list[str]) -> Conditioning:
    """With the picture that is edited, for text encoders that see it."""
    picture = case.family.text_pictures(case.source)
    seen = {} if picture is None else {PICTURE: torch.stack([picture(case.tiny.edited)] * len(prompts))}
    return tokenized(case.family, parts, with_pictures(prompts, seen), case.tiny.length)


def views(case, count: int, sides: tuple[int, int] | None = None) -> Conditioning:
    """Of whole images as the stock pipeline draws them; and of what it must edit."""
    height, width = sides or (case.tiny.side, case.tiny.side)
    shown: Conditioning = {}
    if case.tiny.edited:
        pixels = to_tensor(np.array(case.tiny.edited))[None].expand(count, -1, -1, -1)
        shown = case.family.encode_conditioning(case.family.load(case.source, "vae", torch.float32), pixels)
    return shown | case.family.describe_views([View((width, height), (0, 0), (width, height))] * count)


def call(case, pipeline: Any, arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = more.pop("generator", None) or [torch.Generator().manual_seed(5 + number) for number in range(2)]
    side = case.tiny.side
    options = {"height": side, "width": side, "num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    options |= more
    if "max_area" in inspect.signature(pipeline.__call__).parameters:  # else it draws a megapixel
        options |= {"max_area": options["height"] * options["width"], "_auto_resize": False}
    case.tiny.prepare(pipeline, options["height"], options["width"])
    if case.tiny.edited and len(generator) > 1:  # such pipelines may draw one at a time
        rows = [{name: of_row(value, row) for name, value in arguments.items()} for row in range(2)]
        options = {**more, "image": case.tiny.edited}
        return torch.cat(
            [call(case, pipeline, each, generator=[own], **options) for each, own in zip(rows, generator, strict=True)]
        )
    copied = {name: [*value] if isinstance(value, list) else value for name, value in arguments.items()}
    # some write what they make of prompts into the list given
    return case.tiny.mended(pipeline)(**copied, **options).images


def of_row(value: Any, row: int) -> Any:
    return value[row : row + 1] if isinstance(value, list | torch.Tensor) else value


def test_module_has_every_member_with_the_contracts_signature(case):
    for name in Family.__annotations__:
        assert hasattr(case.family, name), name
    for name, member in inspect.getmembers(Family, inspect.isfunction):
        if not name.startswith("_"):
            wanted = [p for p in inspect.signature(member).parameters if p != "self"]
            assert list(inspect.signature(getattr(case.family, name)).parameters) == wanted, name


def test_every_part_has_classes_that_are_made_of_their_own_files_alone(case):
    """No Auto class, which any file may send elsewhere, and no pipeline, which loads others."""
    kinds = (diffusers.ModelMixin, diffusers.SchedulerMixin, PreTrainedModel, PreTrainedTokenizerBase)
    declared = {name: classes for parts in case.family.PARTS.values() for name, classes in parts.items()}
    assert case.family.PARTS.keys() == set(ROLES)
    assert declared.keys() >= {case.family.DENOISER, *case.family.TEXT_ENCODERS, case.family.PROMPT_TOKENIZER}
    for classes in declared.values():
        assert classes
        for entry in classes:
            library, name = entry.split(".")
            name = PROCESSORS.get(name, name)  # of a processor the tokenizer alone is made
            part_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
            missing = isinstance(part_class, diffusers.utils.DummyObject)
            assert missing or issubclass(part_class, kinds), entry
    index = json.loads((case.folder / "model_index.json").read_text(encoding="utf-8"))
    assert all(".".join(index[name]) in classes for name, classes in declared.items())


def test_family_is_found_by_the_pipelines_class(case):
    assert case.family is registry.load("families", case.name)
    assert loading.family_of(case.source, case.name) is case.family


def test_parts_are_frozen_and_in_eval_mode(case, parts):
    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) >= 3
    assert set(parts) >= {case.family.DENOISER, "vae", "scheduler", *case.family.TEXT_ENCODERS}
    for module in modules:
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_dtype_is_heeded(case):
    denoiser = case.family.load(case.source, "denoiser", torch.bfloat16)[case.family.DENOISER]
    assert denoiser.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("prompts", [PROMPTS, *([odd] for odd in ODD_PROMPTS), ["{long}"], ["{long}", "a cat"]])
def test_prompt_embeddings_equal_the_stock_pipelines(case, parts, prompts):
    prompts = [prompt.format(long=case.tiny.filler * (case.tiny.prompt_limit + 20)) for prompt in prompts]
    found, expected = encoded(case, parts, prompts), case.tiny.embeddings(case.stock, prompts)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # what is not padded before it is encoded is rounded otherwise
        tolerance = 1e-5 if case.family.LENGTH_AXES else 0
        torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=tolerance, atol=tolerance)


def test_a_batch_of_prompts_is_what_they_are_one_by_one(case, parts):
    prompts = [*PROMPTS, *ODD_PROMPTS]
    together = encoded(case, parts, prompts)
    alone = stack_conditioning([encoded(case, parts, [prompt]) for prompt in prompts], case.family.LENGTH_AXES)
    assert together.keys() == alone.keys()
    for name, value in together.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-4, atol=1e-5)


def test_prompts_are_kept_without_padding_that_is_no_part_of_the_model(case, parts):
    short, long = encoded(case, parts, ["a"]), encoded(case, parts, ["a" * 9])
    for name, value in short.items():
        axis = case.family.LENGTH_AXES.get(name)
        assert value.shape == long[name].shape if axis is None else value.shape[axis] < long[name].shape[axis], name


def test_frozen_encoders_have_their_part_before(case, parts):
    """What they make of a prompt is made once, while another encoder trains; they can be gone then."""
    tokens = tokens_of(case, parts, PROMPTS)
    with torch.no_grad():
        half = case.family.encode_frozen(parts, tokens)
        trains = case.family.TEXT_ENCODERS
        rest = {name: part for name, part in parts.items() if not name.startswith("text_encoder") or name in trains}
        found = case.family.encode_tokens(rest, half) if trains else half
        again = case.family.encode_tokens(parts, half)
    for name, value in encoded(case, parts, PROMPTS).items():
        assert torch.equal(again[name], value), name
        assert torch.equal(found[name], value), name


def test_prompt_embeddings_carry_gradients_of_the_text_encoder(case, parts):
    for name in case.family.TEXT_ENCODERS:
        encoder = parts[name]
        add_lora(encoder, Lora(), case.family.TEXT_LORA_LAYERS)
        embeddings = case.family.encode_tokens(parts, case.family.tokenize(parts, PROMPTS, case.tiny.length))
        sum(value.square().sum() for value in embeddings.values() if value.is_floating_point()).backward()
        grads = [p.grad for key, p in trainable_parameters(encoder).items() if "lora_B" in key]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads), name


def first_call(case, arguments: dict[str, Any], height: int, width: int) -> tinymodels.Seen:
    """The denoiser's first call in a run of the stock pipeline."""
    module, seen = getattr(case.stock, case.family.DENOISER), []
    names = list(inspect.signature(module.forward).parameters)

    def hook(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        seen.append(case.tiny.read_call(given, output, sides_of(case, height, width)))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    call(case, case.stock, arguments, height=height, width=width)
    handle.remove()
    firsts = seen[::2] if case.tiny.edited else seen[:1]  # of two steps for each
    return tinymodels.Seen(*map(torch.cat, zip(*firsts, strict=True)))


def sides_of(case, height: int, width: int) -> tuple[int, int]:
    scale = case.tiny.side // case.tiny.latents[1]
    return height // scale, width // scale


@pytest.mark.parametrize("shape", [(1, 1), (1, 1.5), (2, 1)], ids=["square", "wide", "tall"])
def test_prediction_equals_the_stock_pipelines_call(case, parts, shape):
    height, width = (int(case.tiny.side * factor) for factor in shape)
    seen = first_call(case, as_prompts(case, PROMPTS), height, width)
    conditioning = {**encoded(case, parts, PROMPTS), **views(case, len(PROMPTS), (height, width))}
    denoiser = parts[case.family.DENOISER]
    with torch.no_grad():
        found = case.family.predict(denoiser, seen.noisy, seen.times, conditioning, 1.0)
    assert found.shape == seen.noisy.shape == (2, case.tiny.latents[0], *sides_of(case, height, width))
    assert seen.prediction.std() > 1e-3
    torch.testing.assert_close(found, seen.prediction.to(found.dtype), rtol=1e-4, atol=1e-5)


def test_prediction_of_a_batch_is_what_it_is_one_by_one(case, parts):
    """At times of their own, and with prompts of other lengths."""
    prompts = ["a", "two red dogs on a hill", ""]
    latents = torch.randn(3, *case.tiny.latents, generator=torch.Generator().manual_seed(1))
    times = drawn_times(case, parts, 3)
    rows = [encoded(case, parts, [prompt]) for prompt in prompts]
    with torch.no_grad():
        alone = torch.cat([predicted(case, parts, latents[i : i + 1], times[i : i + 1], rows[i]) for i in range(3)])
        stacked = stack_conditioning(rows, case.family.LENGTH_AXES)
        together = predicted(case, parts, latents, times, stacked)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def predicted(case, parts, noisy: torch.Tensor, times: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
    conditioning = {**conditioning, **views(case, len(noisy))}
    return case.family.predict(parts[case.family.DENOISER], noisy, times, conditioning, 1.0)


def drawn_times(case, parts, count: int) -> torch.Tensor:
    objective = case.family.objective(parts["scheduler"], Train())
    return objective.draw_times(torch.linspace(0.2, 0.9, count)[:, None].expand(-1, 2), case.tiny.latents[1:])


def test_loss_equals_that_of_the_recipe(case, parts):
    """Corruption and target are written anew in the tests."""
    objective = case.family.objective(parts["scheduler"], Train())
    draw = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(2, *case.tiny.latents, generator=draw) for _ in range(2))
    times = drawn_times(case, parts, 2)
    noisy, target = case.tiny.recipe(latents, noise, times, getattr(objective, "alphas_cumprod", None))
    torch.testing.assert_close(objective.corrupt(latents, noise, times), noisy)
    torch.testing.assert_close(objective.target(latents, noise, times), target)


def test_training_on_one_image_lowers_its_loss(case, parts):
    torch.manual_seed(4)
    denoiser = parts[case.family.DENOISER]
    add_lora(denoiser, Lora(rank=4), case.family.LORA_LAYERS)
    parameters = list(trainable_parameters(denoiser).values())
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    objective = case.family.objective(parts["scheduler"], Train())
    latents, noise = (torch.randn(2, *case.tiny.latents) for _ in range(2))
    times, conditioning = drawn_times(case, parts, 2), encoded(case, parts, PROMPTS)
    noisy, target = objective.corrupt(latents, noise, times), objective.target(latents, noise, times)
    losses = []
    for _ in range(25):
        loss = squared_errors(predicted(case, parts, noisy, times, conditioning), target).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_latents_are_the_autoencoders_normalised(case, parts):
    side = case.tiny.side
    pixels = torch.rand(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(6)) * 2 - 1
    found = case.family.encode_images(parts, pixels)
    mean, std = case.tiny.moments(parts["vae"], pixels)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.std, std)
    assert found.mean.dtype == found.std.dtype == torch.float32
    channels, height, width = case.tiny.latents
    assert found.mean.shape == (2, channels, height, 2 * width)
    assert case.family.latent_size(case.source) in (None, (channels, side // height))


@torch.no_grad()
def test_latents_decode_to_the_image(case, parts):
    """The stock pipeline's way from latents to pixels undoes the way here; the autoencoder itself loses more."""
    side = case.tiny.side
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(6)) * 2 - 1
    latents = case.family.encode_images(parts, pixels).mean
    expected = case.tiny.decoded(case.stock, parts["vae"], latents)
    own = case.tiny.round_trip(case.stock.vae, pixels)
    torch.testing.assert_close(expected, own, rtol=1e-4, atol=1e-5)


def test_resolution_is_the_stock_pipelines(case):
    assert case.family.resolution(case.source) == case.tiny.default_side(case.stock)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_sampling_without_text_encoders_equals_the_stock_pipeline(case, parts, guided):
    scale = case.tiny.guidance if guided else 1.0
    kept = {name: part for name, part in parts.items() if not name.startswith(("text", "tok"))}
    found = call(case, case.family.pipeline(kept), as_embeddings(case, parts, PROMPTS, scale))
    expected = call(case, case.stock, as_prompts(case, PROMPTS, scale))
    assert type(case.family.pipeline(kept)) is type(case.stock)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_objective_forgets_what_the_scheduler_sampled_last(case, parts):
    before = drawn_times(case, parts, 3)
    dynamic = parts["scheduler"].config.get("use_dynamic_shifting")
    parts["scheduler"].set_timesteps(3, **({"mu": 0.5} if dynamic else {}))
    assert torch.equal(before, drawn_times(case, parts, 3))


def trained(case, parts: Components, *, lora: Lora, text: bool) -> dict[str, Any]:
    """Adapters with random numbers in lora_B, as if trained."""
    modules = {case.family.DENOISER: case.family.LORA_LAYERS}
    if text:
        modules |= dict.fromkeys(case.family.TEXT_ENCODERS, case.family.TEXT_LORA_LAYERS)
    for name, layers in modules.items():
        add_lora(parts[name], lora, layers)
        for parameter in trainable_parameters(parts[name]).values():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3
    return {name: parts[name] for name in case.family.TEXT_ENCODERS if text}


@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "with text encoder"])
def test_saved_lora_gives_equal_images_in_a_stock_pipeline(case, parts, tmp_path, text):
    lora = Lora(rank=3, lora_alpha=7.5, lora_dropout=0.5, train_text_encoder=text)
    if text and not case.family.TEXT_ENCODERS:
        pytest.skip("this family has no text encoder that trains")
    encoders = trained(case, parts, lora=lora, text=text)
    asked = as_prompts(case, PROMPTS, 2.0)
    base = call(case, case.stock, asked)
    for module in parts.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    expected = call(case, case.family.pipeline(parts), asked)
    file = save_lora(tmp_path / "lora", {case.family.DENOISER: parts[case.family.DENOISER], **encoders})
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [file.name]
    assert file.name == "pytorch_lora_weights.safetensors"
    stock = fresh_stock(case)
    stock.load_lora_weights(tmp_path / "lora")
    found = call(case, stock, asked)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    "lora",
    [
        Lora(lora_alpha=3.0, use_rslora=True),  # its alpha / sqrt(rank) is not to be seen in the tensors
        Lora(lora_alpha=3.0, adapter="dora"),
        Lora(rank_pattern=("to_q", "2", "to_v", "6"), alpha_pattern=("to_k", "9", "to_q", "1")),
    ],
    ids=["rslora", "dora", "patterns"],
)
def test_scales_and_magnitudes_are_kept_in_a_stock_pipeline(case, parts, tmp_path, lora):
    denoiser = parts[case.family.DENOISER]
    add_lora(denoiser, lora, wanted_layers(lora, case.family), case.family.DENOISER)
    draw = torch.Generator().manual_seed(2)
    for parameter in trainable_parameters(denoiser).values():
        parameter.data += torch.randn(parameter.shape, generator=draw) * 0.3
    denoiser.eval()
    expected = call(case, case.family.pipeline(parts), as_prompts(case, PROMPTS))
    stock = fresh_stock(case)
    stock.load_lora_weights(save_lora(tmp_path, {case.family.DENOISER: denoiser}).parent)
    torch.testing.assert_close(call(case, stock, as_prompts(case, PROMPTS)), expected, rtol=0, atol=1e-5)


def test_applied_file_acts_in_full_and_not_at_all_at_scale_zero(case, parts, tmp_path):
    encoders = trained(case, parts, lora=Lora(rank=3, lora_alpha=7.5), text=True)
    file = save_lora(tmp_path, {case.family.DENOISER: parts[case.family.DENOISER], **encoders})
    full, none = fresh_stock(case), fresh_stock(case)
    apply_lora(full, file, 1.0)
    apply_lora(none, tmp_path, 0.0)
    asked = as_prompts(case, PROMPTS)
    expected = call(case, case.family.pipeline(parts), asked)
    torch.testing.assert_close(call(case, full, asked), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(call(case, none, asked), call(case, case.stock, asked), rtol=0, atol=1e-6)


def test_equal_adapters_give_equal_files(case, parts, tmp_path):
    encoders = trained(case, parts, lora=Lora(rank=2), text=True)
    files = [
        save_lora(tmp_path / str(i), {case.family.DENOISER: parts[case.family.DENOISER], **encoders}) for i in range(2)
    ]
    assert contents(files[0]) == contents(files[1])


def test_saved_metadata_is_short_and_keeps_alpha(case, parts, tmp_path):
    """Settings at their default are left out, so that older versions of PEFT need not know them."""
    encoders = trained(case, parts, lora=Lora(rank=2, lora_alpha=8.0, lora_dropout=0.1), text=True)
    file = save_lora(tmp_path, {case.family.DENOISER: parts[case.family.DENOISER], **encoders})
    metadata, tensors = contents(file)
    for name in encoders:  # CLIP's usual names
        assert any(key.startswith(f"{name}.text_model.encoder.layers.0.") for key in tensors)
    settings = json.loads(metadata["lora_adapter_metadata"])
    for name in (case.family.DENOISER, *encoders):
        own = {key.removeprefix(f"{name}."): value for key, value in settings.items() if key.startswith(f"{name}.")}
        layers = own.pop("target_modules")
        assert own == {"r": 2, "lora_alpha": 8.0}  # 8 is PEFT's default, but readers should not have to know
        assert layers == sorted(layers)


def contents(file: Path) -> tuple[dict[str, str], dict[str, list]]:
    """Metadata and tensors; the bytes differ, as safetensors writes the metadata in random order."""
    with safe_open(file, "pt") as opened:
        return opened.metadata(), {key: opened.get_tensor(key).tolist() for key in opened.keys()}  # noqa: SIM118


def test_wrapped_denoiser_saves_and_predicts(case, parts, tmp_path):
    """As DistributedDataParallel wraps it."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module):
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    trained(case, parts, lora=Lora(rank=2), text=False)
    denoiser = parts[case.family.DENOISER]
    conditioning = {**encoded(case, parts, PROMPTS), **views(case, 2)}
    arguments = (torch.randn(2, *case.tiny.latents), drawn_times(case, parts, 2), conditioning, 1.0)
    assert torch.equal(case.family.predict(Wrapper(denoiser), *arguments), case.family.predict(denoiser, *arguments))
    files = [
        save_lora(tmp_path / str(i), {case.family.DENOISER: m}) for i, m in enumerate([denoiser, Wrapper(denoiser)])
    ]
    assert contents(files[0]) == contents(files[1])


def test_gradients_reach_every_lora_parameter_in_bf16(case, parts, tmp_path):
    denoiser = case.family.load(case.source, "denoiser", torch.bfloat16)[case.family.DENOISER]
    trained(case, {case.family.DENOISER: denoiser}, lora=Lora(rank=2), text=False)
    noisy, conditioning = torch.randn(2, *case.tiny.latents), {**encoded(case, parts, PROMPTS), **views(case, 2)}
    prediction = case.family.predict(denoiser, noisy, drawn_times(case, parts, 2), conditioning, 3.5)
    prediction.float().square().mean().backward()
    for name, parameter in trainable_parameters(denoiser).items():
        assert parameter.dtype == torch.float32, name
        idle = any(part in name for part in case.tiny.idle)
        assert (parameter.grad is None) == idle, name
        assert idle or parameter.grad.isfinite().all(), name


def test_prompts_that_are_too_long_are_found_by_the_tokenizer_alone(case, monkeypatch):
    """The text encoder, which may take gigabytes, is not loaded for that."""
    length, filler = case.tiny.prompt_limit, case.tiny.filler
    limit, (with_marks,) = counted(case, [filler])
    assert limit == length
    loaded, inner = [], loading._load
    monkeypatch.setattr(loading, "_load", lambda source, name, *more: loaded.append(name) or inner(source, name, *more))
    fits = filler * (length - with_marks + 1)
    limit, cut = prompts.cut_prompts(case.family, case.source, ["", fits, fits + filler], case.tiny.length)
    assert list(cut) == [False, False, True]
    assert limit == length and loaded == [case.family.PROMPT_TOKENIZER]


def counted(case, texts: list[str]) -> tuple[int, list[int]]:
    """The limit, and how many tokens texts have."""
    name = case.family.PROMPT_TOKENIZER
    tokenizer = case.family.load(case.source, "text", torch.float32)[name]
    return case.family.prompt_limit(tokenizer, case.tiny.length), case.family.count_tokens(tokenizer, texts)


def test_a_view_is_told_apart_where_the_family_heeds_it(case, parts):
    """Names of its own, one row for each image, float32: they are kept with the latents."""
    other = View((40, 30), (3, 0), (case.tiny.side, case.tiny.side))
    described = case.family.describe_views([other, other])
    assert not described.keys() & {"mean", "std", *encoded(case, parts, ["a"])}
    assert all(value.shape[0] == 2 and value.dtype == torch.float32 for value in described.values())


def test_weights_of_older_transformers_load_with_their_names(case, tmp_path):
    """Real SD 1.5 and FLUX.1 have CLIP's weights as "text_model. ...", and SD 1.5 position_ids besides."""
    if case.stock.text_encoder.__class__ is not transformers.CLIPTextModel:
        pytest.skip("no such text encoder")
    old = tmp_path / "old"
    shutil.copytree(case.folder, old)
    file = old / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    assert not any(name.startswith("text_model.text_model") for name in weights), "the small model has them already"
    positions = torch.arange(tinymodels.CLIP_LENGTH)[None]
    save_file({**weights, "text_model.embeddings.position_ids": positions}, file, metadata={"format": "pt"})
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(old)))
    new, other = (case.family.load(one, "text", torch.float32) for one in (case.source, source))
    first, second = (encoded(case, text, PROMPTS) for text in (new, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_presets_of_layers_are_some_of_all_linear_layers_and_convolutions(case):
    denoiser = case.parts[case.family.DENOISER]
    attn, both, every = (
        set(layer_names(denoiser, wanted_layers(Lora(lora_layers=(name,)), case.family)))
        for name in ("attn", "attn-mlp", "all")
    )
    assert attn < both <= every
    assert any("to_q" in name or "qkv" in name for name in attn)
    assert not any(word in name for name in both for word in ("norm", "mod.", "embed", "adaLN"))


@pytest.mark.parametrize("adapter", ["loha", "lokr"])
def test_loha_and_lokr_come_back_from_their_files(case, parts, tmp_path, adapter):
    """Where the original code has one layer of several, or of swapped halves, too."""
    if registry.name_of(case.family) not in registry.names("families.layers"):
        pytest.skip("what other programs call its layers is not known")
    denoiser, lora = parts[case.family.DENOISER], Lora(adapter=adapter, rank=2, lora_alpha=3.0)
    add_lora(denoiser, lora, wanted_layers(replace(lora, lora_layers=("attn-mlp",)), case.family))
    draw = torch.Generator().manual_seed(2)
    for parameter in trainable_parameters(denoiser).values():
        parameter.data += torch.randn(parameter.shape, generator=draw) * 0.3
    modules, names = {case.family.DENOISER: denoiser}, names_of(case.family, dict(denoiser.config))
    again = kohya.read(FileContent(load_file(save_lora(tmp_path, modules, names=names)), {}), names)
    [saved], [read] = weights_of(modules).values(), again.values()
    assert saved.keys() == read.keys()
    for name, layer in saved.items():
        delta = layer.delta()
        torch.testing.assert_close(read[name].delta().reshape(delta.shape), delta, rtol=1e-4, atol=1e-5)
