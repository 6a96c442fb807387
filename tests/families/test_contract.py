"""Every family keeps the contract: same numbers as the stock pipeline of small models of its real classes."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dreamlora import registry
from dreamlora.config import Lora, Model, Train
from dreamlora.interfaces import Components, Family, ModelSource
from dreamlora.lora.files import apply_lora
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.models import loading, prompts
from tests import tinymodels

PROMPTS = ["a cat", "two red dogs"]
ROLES = ("text", "vae", "denoiser", "scheduler")


@pytest.fixture(scope="module", params=registry.names("families"))
def case(request, tmp_path_factory) -> SimpleNamespace:
    """A family with its source and a fresh stock pipeline to compare with."""
    folder = tinymodels.SAVERS[request.param](tmp_path_factory.mktemp("models") / request.param)
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))
    family = loading.family_of(source)
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    return SimpleNamespace(name=request.param, folder=folder, source=source, family=family, stock=stock)


def parts_of(family: Family, source: ModelSource) -> Components:
    parts: Components = {}
    for role in ROLES:
        parts |= family.load(source, role, torch.float32)
    return parts


@pytest.fixture
def parts(case) -> Components:
    return parts_of(case.family, case.source)


def stock_embeddings(pipeline: Any, **options: Any) -> dict[str, torch.Tensor]:
    """What the stock pipeline's encode_prompt gives, by the names of its call."""
    if isinstance(pipeline, diffusers.FluxPipeline):
        embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, **options)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    embeds, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    return {"prompt_embeds": embeds}


def call(pipeline: Any, arguments: dict[str, Any], **more: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    return pipeline(**arguments, **(options | more)).images


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


@torch.no_grad()  # attention's kernels with and without gradients round differently
def test_prompt_embeddings_equal_the_stock_pipelines(case, parts):
    found = case.family.encode_tokens(parts, case.family.tokenize(parts, PROMPTS, None))
    expected = stock_embeddings(case.stock)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_prompt_embeddings_carry_gradients_of_the_text_encoder(case, parts):
    encoder = parts[case.family.TEXT_ENCODERS[0]]
    add_lora(encoder, Lora(), case.family.TEXT_LORA_LAYERS)
    embeddings = case.family.encode_tokens(parts, case.family.tokenize(parts, PROMPTS, None))
    sum(value.square().sum() for value in embeddings.values()).backward()
    assert any(p.grad.abs().sum() > 0 for name, p in trainable_parameters(encoder).items() if "lora_B" in name)


def captured_call(pipeline: Any, denoiser: str, **options: Any) -> tuple[tuple, dict[str, Any], torch.Tensor]:
    """Arguments and result of the denoiser's first call in a run of the stock pipeline."""
    module, calls = getattr(pipeline, denoiser), []

    def hook(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, output[0].detach()))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    call(pipeline, stock_embeddings(pipeline), **options)
    handle.remove()
    return calls[0]


def test_prediction_equals_the_stock_pipelines_call(case, parts):
    args, kwargs, expected = captured_call(case.stock, case.family.DENOISER, guidance_scale=1.0, width=24)
    noisy = args[0] if args else kwargs["hidden_states"]
    times = args[1] if args else kwargs["timestep"]
    if noisy.dim() == 3:  # packed latents: 2 x 2 patches of 8 x 12 latents as 24 tokens
        unpack = diffusers.FluxPipeline._unpack_latents
        noisy, expected = (unpack(x, 16, 24, vae_scale_factor=2) for x in (noisy, expected))
    conditioning = stock_embeddings(case.stock)
    with torch.no_grad():
        found = case.family.predict(parts[case.family.DENOISER], noisy, times.expand(len(PROMPTS)), conditioning, 1.0)
    assert found.shape == noisy.shape
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_latents_equal_the_stock_way_back(case, parts):
    """Undoing shift and scale as the pipeline does before decoding gives the autoencoder's own moments."""
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    found = case.family.encode_images(parts, pixels)
    vae = parts["vae"]
    posterior = vae.encode(pixels).latent_dist
    shift = vae.config.shift_factor or 0
    torch.testing.assert_close(found.mean / vae.config.scaling_factor + shift, posterior.mean)
    torch.testing.assert_close(found.std / vae.config.scaling_factor, posterior.std)
    assert found.mean.dtype == found.std.dtype == torch.float32


def test_resolution_is_the_stock_pipelines(case):
    stock = case.stock
    size = stock.default_sample_size if hasattr(stock, "default_sample_size") else stock.unet.config.sample_size
    assert case.family.resolution(case.source) == size * stock.vae_scale_factor


def test_sampling_without_text_encoders_equals_the_stock_pipeline(case, parts):
    conditioning = case.family.encode_tokens(parts, case.family.tokenize(parts, PROMPTS, None))
    negative = case.family.encode_tokens(parts, case.family.tokenize(parts, ["", ""], None))
    kept = {name: part for name, part in parts.items() if not name.startswith(("text", "tok"))}
    found = call(case.family.pipeline(kept), case.family.call_arguments(conditioning, negative), guidance_scale=4.0)
    expected = call(case.stock, {"prompt": PROMPTS}, guidance_scale=4.0)
    assert type(case.family.pipeline(kept)) is type(case.stock)
    torch.testing.assert_close(found, expected)


def test_objective_forgets_what_the_scheduler_sampled_last(case, parts):
    before = case.family.objective(parts["scheduler"], Train()).draw_times(torch.tensor([[0.3, 0.5]]))
    parts["scheduler"].set_timesteps(3, **({"mu": 0.5} if hasattr(parts["scheduler"], "sigmas") else {}))
    after = case.family.objective(parts["scheduler"], Train()).draw_times(torch.tensor([[0.3, 0.5]]))
    assert torch.equal(before, after)


def trained(case, parts: Components, *, lora: Lora, text: bool) -> dict[str, Any]:
    """Adapters with random numbers in lora_B, as if trained."""
    modules = {case.family.DENOISER: case.family.LORA_LAYERS}
    if text:
        modules[case.family.TEXT_ENCODERS[0]] = case.family.TEXT_LORA_LAYERS
    for name, layers in modules.items():
        add_lora(parts[name], lora, layers)
        for parameter in trainable_parameters(parts[name]).values():
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.3
    return {name: parts[name] for name in case.family.TEXT_ENCODERS if text}


def fresh_stock(case) -> Any:
    return diffusers.DiffusionPipeline.from_pretrained(case.folder, safety_checker=None)


@pytest.mark.parametrize("text", [False, True], ids=["denoiser", "with text encoder"])
def test_saved_lora_gives_equal_images_in_a_stock_pipeline(case, parts, tmp_path, text):
    lora = Lora(rank=3, lora_alpha=7.5, lora_dropout=0.5, train_text_encoder=text)
    encoders = trained(case, parts, lora=lora, text=text)
    base = call(fresh_stock(case), {"prompt": PROMPTS}, guidance_scale=2.0)
    for module in parts.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    expected = call(case.family.pipeline(parts), {"prompt": PROMPTS}, guidance_scale=2.0)
    file = case.family.save_lora(tmp_path / "lora", parts[case.family.DENOISER], encoders)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [file.name]
    assert file.name == "pytorch_lora_weights.safetensors"
    stock = fresh_stock(case)
    stock.load_lora_weights(tmp_path / "lora")
    found = call(stock, {"prompt": PROMPTS}, guidance_scale=2.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-3


def test_rslora_keeps_its_scale_in_a_stock_pipeline(case, parts, tmp_path):
    """Its alpha / sqrt(rank) is not to be seen in the tensors."""
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=list(case.family.LORA_LAYERS))
    parts[case.family.DENOISER].add_adapter(config)
    for parameter in trainable_parameters(parts[case.family.DENOISER]).values():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = call(case.family.pipeline(parts), {"prompt": PROMPTS})
    stock = fresh_stock(case)
    stock.load_lora_weights(case.family.save_lora(tmp_path, parts[case.family.DENOISER], {}).parent)
    torch.testing.assert_close(call(stock, {"prompt": PROMPTS}), expected, rtol=0, atol=1e-5)


def test_applied_file_acts_in_full_and_not_at_all_at_scale_zero(case, parts, tmp_path):
    encoders = trained(case, parts, lora=Lora(rank=3, lora_alpha=7.5), text=True)
    file = case.family.save_lora(tmp_path, parts[case.family.DENOISER], encoders)
    base, full, none = fresh_stock(case), fresh_stock(case), fresh_stock(case)
    apply_lora(full, file, 1.0)
    apply_lora(none, tmp_path, 0.0)
    expected = call(case.family.pipeline(parts), {"prompt": PROMPTS})
    torch.testing.assert_close(call(full, {"prompt": PROMPTS}), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(call(none, {"prompt": PROMPTS}), call(base, {"prompt": PROMPTS}), rtol=0, atol=1e-6)


def test_equal_adapters_give_equal_files(case, parts, tmp_path):
    encoders = trained(case, parts, lora=Lora(rank=2), text=True)
    files = [case.family.save_lora(tmp_path / str(i), parts[case.family.DENOISER], encoders) for i in range(2)]
    assert contents(files[0]) == contents(files[1])


def test_saved_metadata_is_short_and_keeps_alpha(case, parts, tmp_path):
    """Settings at their default are left out, so that older versions of PEFT need not know them."""
    encoders = trained(case, parts, lora=Lora(rank=2, lora_alpha=8.0, lora_dropout=0.1), text=True)
    file = case.family.save_lora(tmp_path, parts[case.family.DENOISER], encoders)
    metadata, tensors = contents(file)
    assert any(key.startswith("text_encoder.text_model.encoder.layers.0.") for key in tensors)  # CLIP's usual names
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
    times = case.family.objective(parts["scheduler"], Train()).draw_times(torch.tensor([[0.3, 0], [0.6, 0]]))
    arguments = (torch.randn(2, 4, 8, 8), times, stock_embeddings(case.stock), 1.0)
    assert torch.equal(case.family.predict(Wrapper(denoiser), *arguments), case.family.predict(denoiser, *arguments))
    files = [case.family.save_lora(tmp_path / str(i), m, {}) for i, m in enumerate([denoiser, Wrapper(denoiser)])]
    assert contents(files[0]) == contents(files[1])


def test_gradients_reach_every_lora_parameter_in_bf16(case, tmp_path):
    denoiser = case.family.load(case.source, "denoiser", torch.bfloat16)[case.family.DENOISER]
    trained(case, {case.family.DENOISER: denoiser}, lora=Lora(rank=2), text=False)
    scheduler = case.family.load(case.source, "scheduler", None)["scheduler"]
    times = case.family.objective(scheduler, Train()).draw_times(torch.tensor([[0.3, 0], [0.6, 0]]))
    prediction = case.family.predict(denoiser, torch.randn(2, 4, 8, 8), times, stock_embeddings(case.stock), 3.5)
    prediction.float().square().mean().backward()
    for name, parameter in trainable_parameters(denoiser).items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_long_prompts_are_cut_as_the_pipeline_cuts_them(case, parts):
    tokens = case.family.tokenize(parts, ["dog " * 40, "cat"], None)
    assert tokens["input_ids"].shape == (2, tinymodels.CLIP_LENGTH)
    assert tokens["input_ids"][0, -1] == parts["tokenizer"].eos_token_id


def test_prompts_that_are_too_long_are_found_by_the_tokenizer_alone(case, monkeypatch):
    """The text encoder, which may take gigabytes, is not loaded for that."""
    loaded = []
    inner = loading._load
    monkeypatch.setattr(loading, "_load", lambda source, name, *more: loaded.append(name) or inner(source, name, *more))
    fits = {"tokenizer": "a" * 14, "tokenizer_2": "a" * 510}[case.family.PROMPT_TOKENIZER]
    limit, cut = prompts.cut_prompts(case.family, case.source, ["", fits, fits + "bcd"], None)
    assert list(cut) == [False, False, True] and loaded == [case.family.PROMPT_TOKENIZER]
    assert limit == {"tokenizer": tinymodels.CLIP_LENGTH, "tokenizer_2": 512}[case.family.PROMPT_TOKENIZER]


def test_weights_of_older_transformers_load_with_their_names(case, tmp_path):
    """Real SD 1.5 and FLUX.1 have CLIP's weights as "text_model. ...", and SD 1.5 position_ids besides."""
    old = tmp_path / "old"
    shutil.copytree(case.folder, old)
    file = old / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    assert not any(name.startswith("text_model.text_model") for name in weights), "the small model has them already"
    positions = torch.arange(tinymodels.CLIP_LENGTH)[None]
    save_file({**weights, "text_model.embeddings.position_ids": positions}, file, metadata={"format": "pt"})
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(old)))
    new, other = (case.family.load(one, "text", torch.float32) for one in (case.source, source))
    first, second = (
        case.family.encode_tokens(text, case.family.tokenize(text, PROMPTS, None)) for text in (new, other)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
