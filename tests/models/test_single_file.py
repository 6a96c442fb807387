"""Single files of the original layouts give the pipelines that they were made of; all else is refused by its name."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamlora.__main__ import main
from dreamlora.config import Model
from dreamlora.errors import UserError, WriteError
from dreamlora.models import loading
from dreamlora.models.local import check_model
from dreamlora.models.single_file import configs, conversion, resolve
from dreamlora.models.single_file.contents import Contents, read_contents
from dreamlora.models.single_file.kinds import (
    STABLE_DIFFUSION_1,
    STABLE_DIFFUSION_XL,
    Prediction,
    prediction_of,
    recognize,
)
from tests import singlefiles
from tests.fuzzing import fuzzed, harmless
from tests.limits import file_size_limit

KINDS = ("1", "2", "xl")
UNET, VAE = "model.diffusion_model.", "first_stage_model."
F16 = torch.float16
ONE = torch.zeros(2, 2)


class Made:
    """Small pipelines and their files, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pipelines: dict[str, Any] = {}

    def pipeline(self, kind: str) -> Any:
        if kind not in self._pipelines:
            self._pipelines[kind] = singlefiles.pipeline(kind, self.folder / f"tokenizers-{kind}")
        return self._pipelines[kind]

    def file(self, kind: str) -> Path:
        file = self.folder / f"{kind}.safetensors"
        return file if file.exists() else singlefiles.save_original(self.pipeline(kind), file)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setenv("DREAMLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "single_files"


def model(file: Path, **options: Any) -> Model:
    return Model(pretrained_model_name_or_path=str(file), **options)


def resolved(file: Path, **options: Any) -> Any:
    return loading.resolve_source(model(file, **options))


def parts_of(source: Any) -> tuple[Any, dict[str, Any]]:
    family = loading.family_of(source)
    return family, {
        name: part for role in family.PARTS for name, part in family.load(source, role, torch.float32).items()
    }


def drawn(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    images: Tensor = pipeline(
        ["a photo of a cat"], num_inference_steps=3, height=64, width=64, output_type="pt", generator=generator
    ).images
    return images


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_and_an_image_are_those_of_the_source(made: Made, kind: str) -> None:
    stock = made.pipeline(kind)
    check_model(model(made.file(kind)))
    family, parts = parts_of(resolved(made.file(kind)))
    modules = [name for name, part in stock.components.items() if isinstance(part, torch.nn.Module)]
    assert set(modules) <= parts.keys()
    for name in modules:
        expected = getattr(stock, name).state_dict()
        found = parts[name].state_dict()
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        ours, theirs = parts[name].config, getattr(stock, name).config
        own = {"sample_size", "_name_or_path", "_use_default_values", "pad_token_id", "architectures", "dtype"}
        differ = {key for key in dict(theirs if isinstance(theirs, dict) else theirs.to_dict())} - own
        for key in differ:
            a, b = (config[key] if isinstance(config, dict) else getattr(config, key) for config in (ours, theirs))
            assert json.dumps(a, default=str) == json.dumps(b, default=str) or set(_list(a)) == set(_list(b)), key
    assert torch.allclose(drawn(family.pipeline(parts)), drawn(stock), atol=1e-4)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("kind", ["1", "xl"])
def test_the_folder_is_one_for_the_stock_pipeline_too(made: Made, kind: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(resolved(made.file(kind)).path, local_files_only=True)
    assert type(pipeline) is type(made.pipeline(kind))
    assert torch.allclose(drawn(pipeline), drawn(made.pipeline(kind)), atol=1e-4)


REAL_XL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
    "sample_size": 128,
}
REAL_1 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "transformer_layers_per_block": [1, 1, 1, 1],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "use_linear_projection": False,
    "sample_size": 64,
}
"""As the repositories of stable-diffusion-xl-base-1.0 and stable-diffusion-v1-5 have it."""


@pytest.mark.parametrize(("kind", "config"), [(STABLE_DIFFUSION_1, REAL_1), (STABLE_DIFFUSION_XL, REAL_XL)])
def test_the_config_of_the_real_models_is_read_from_their_shapes(kind: Any, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    shapes = {f"{UNET}{name}": tuple(own.shape) for name, own in singlefiles.original_unet(unet).items()}
    found = configs.unet_config(Contents(Path("x"), shapes, {}), kind, Prediction())
    assert {name: found[name] for name in config} == config
    assert (found["layers_per_block"], found["in_channels"], found["out_channels"]) == (2, 4, 4)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("it's 1girl, 2boys; masterpiece!!", [585, 568, 272, 1611, 267, 273, 2034, 282, 12066, 748]),
        ("Ünïcödé café", [6522, 77, 35689, 66, 7255, 67, 4166, 15304]),
        ("日本語の猫", [39121, 44353, 34002, 252, 21575, 163, 234, 360]),
        ("👍🏽 sks", [43722, 48136]),
        ("", []),
    ],
)
def test_ids_are_those_of_openclips_own_tokenizer(made: Made, prompt: str, ids: list[int]) -> None:
    parts = loading.family_of(source := resolved(made.file("xl"))).load(source, "text", None)
    assert parts["tokenizer"](prompt).input_ids == [49406, *ids, 49407]
    if "!" not in prompt:  # which is also the second one's pad, and so a word of its own, as in the stock pipeline
        assert parts["tokenizer_2"](prompt).input_ids == [49406, *ids, 49407]


@pytest.mark.parametrize(("kind", "pads"), [("1", [49407]), ("2", [0]), ("xl", [49407, 0])])
def test_pads(made: Made, kind: str, pads: list[int]) -> None:
    parts = loading.family_of(source := resolved(made.file(kind))).load(source, "text", None)
    tokenizers = [part for name, part in parts.items() if name.startswith("tokenizer")]
    assert [tokenizer.pad_token_id for tokenizer in tokenizers] == pads
    assert all(tokenizer.model_max_length == 77 for tokenizer in tokenizers)
    assert tokenizers[-1]("a", padding="max_length").input_ids[3:] == pads[-1:] * 74


def test_a_copy_is_the_same_model_and_is_not_converted_again(made: Made, tmp_path: Path, cache: Path) -> None:
    first = resolved(made.file("1"))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    copy = shutil.copy(made.file("1"), tmp_path / "another name.SAFETENSORS")
    second = resolved(Path(copy))
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert Path(first.path) == folder


def test_another_content_is_another_model(made: Made, tmp_path: Path) -> None:
    tensors = load_file(made.file("1"))
    tensors[f"{UNET}out.2.bias"][0] += 1
    save_file(tensors, tmp_path / "changed.safetensors")
    save_file(load_file(made.file("1")), tmp_path / "told.safetensors", {"modelspec.prediction_type": "v"})
    ids = [resolved(file).model_id for file in (made.file("1"), *sorted(tmp_path.glob("*.safetensors")))]
    assert len(set(ids)) == 3


def test_numbers_stay_in_the_precision_that_they_are_stored_in(made: Made, tmp_path: Path) -> None:
    half = {name: own.to(F16) if own.is_floating_point() else own for name, own in load_file(made.file("xl")).items()}
    half[f"{VAE}decoder.conv_in.bias"] = half[f"{VAE}decoder.conv_in.bias"].bfloat16()
    save_file(half, tmp_path / "half.safetensors")
    folder = Path(resolved(tmp_path / "half.safetensors").path)
    assert {own.dtype for own in load_file(folder / "unet/diffusion_pytorch_model.safetensors").values()} == {F16}
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    assert vae["decoder.conv_in.bias"].dtype is torch.bfloat16


SCALAR = torch.tensor([])
PREDICTIONS: dict[str, tuple[str, dict[str, Any], dict[str, str], tuple[str, bool, str]]] = {
    "plain": ("xl", {}, {}, ("epsilon", False, "leading")),
    "NoobAI's marks": ("xl", {"v_pred": SCALAR, "ztsnr": SCALAR}, {}, ("v_prediction", True, "trailing")),
    "velocity alone": ("xl", {"v_pred": SCALAR}, {}, ("v_prediction", False, "leading")),
    "metadata": ("1", {}, {"modelspec.prediction_type": "v"}, ("v_prediction", False, "leading")),
    "metadata of 2": ("2", {}, {"modelspec.prediction_type": "epsilon"}, ("epsilon", False, "leading")),
    "steps of 2 base": ("2", {"global_step": torch.tensor(875000)}, {}, ("epsilon", False, "leading")),
    "other steps": ("2", {"global_step": torch.tensor(140000)}, {}, ("v_prediction", False, "leading")),
    "odd steps": ("2", {"global_step": torch.tensor(float("nan"))}, {}, ("v_prediction", False, "leading")),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_what_it_predicts(made: Made, tmp_path: Path, name: str) -> None:
    kind, more, metadata, expected = PREDICTIONS[name]
    known = recognize(read_contents(made.file(kind)))
    save_file({"x": ONE, **more}, tmp_path / "x.safetensors", metadata or None)
    prediction = prediction_of(read_contents(tmp_path / "x.safetensors"), known)
    config = configs.scheduler_config(known, prediction)
    assert (config["prediction_type"], config["rescale_betas_zero_snr"], config["timestep_spacing"]) == expected


def test_the_scheduler_of_a_marked_file(made: Made, tmp_path: Path) -> None:
    file = singlefiles.save_original(made.pipeline("xl"), tmp_path / "x.safetensors", v_pred=SCALAR, ztsnr=SCALAR)
    scheduler = loading.family_of(source := resolved(file)).load(source, "scheduler", None)["scheduler"]
    assert (scheduler.config.prediction_type, scheduler.config.timestep_spacing) == ("v_prediction", "trailing")
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_a_guess_is_told_with_the_flag_against_it(made: Made, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    file = Path(shutil.copy(made.file("2"), tmp_path / "guessed.safetensors"))  # it is told once for each file
    source = resolved(file)
    assert [record.getMessage() for record in caplog.records if "guessed" in record.getMessage()] == [
        f"{file}: a file of Stable Diffusion 2.x does not say what the model predicts. Velocity is taken, as for 2.1 "
        "at 768 pixels; for a model made from 2.0 or 2.1 base give --prediction_type epsilon --resolution 512"
    ]
    assert loading.family_of(source).resolution(source) == 768
    base = singlefiles.save_original(
        made.pipeline("2"), tmp_path / "b.safetensors", {"modelspec.prediction_type": "epsilon"}
    )
    assert loading.family_of(source).resolution(resolved(base)) == 512


def test_no_guess_is_told_where_the_run_says_what_is_predicted(made: Made, caplog: Any, tmp_path: Path) -> None:
    file = Path(shutil.copy(made.file("2"), tmp_path / "told.safetensors"))
    source = loading.resolve_source(model(file), prediction_type="epsilon")
    scheduler = loading.family_of(source).load(source, "scheduler", None)["scheduler"]
    assert scheduler.config.prediction_type == "epsilon"
    assert "told" not in "".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")


@pytest.mark.parametrize("path", ["gone.safetensors", "models/gone.SAFETENSORS", "/a/b/gone.ckpt", "gone.gguf"])
def test_a_file_that_is_not_there(path: str) -> None:
    for name in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        with pytest.raises(UserError, match=f"no such file: {path}"):
            check_model(Model(**{name: path}))  # type: ignore[arg-type]


def test_a_variant_is_for_folders(made: Made) -> None:
    assert resolved(made.file("1"), variant="fp16").variant is None


def test_clip_without_its_first_word_and_layers_that_2_does_not_use(made: Made, tmp_path: Path) -> None:
    tensors = {name.replace(".text_model.", "."): own for name, own in load_file(made.file("1")).items()}
    save_file(tensors, tmp_path / "1.safetensors")
    tensors = load_file(made.file("2"))
    assert any(".resblocks.23." in name for name in tensors)
    save_file({k: v for k, v in tensors.items() if ".resblocks.23." not in k}, tmp_path / "2.safetensors")
    for kind in ("1", "2"):
        source = resolved(tmp_path / f"{kind}.safetensors")
        found = loading.family_of(source).load(source, "text", torch.float32)["text_encoder"].state_dict()
        expected = made.pipeline(kind).text_encoder.state_dict()
        assert all(torch.equal(found[name], own) for name, own in expected.items())


# What is refused


def of(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: own for name, own in tensors.items() if name.startswith(prefix)}


def without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: own for name, own in tensors.items() if not name.startswith(prefix)}


def bare(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): own for name, own in of(prefix, tensors).items()}


def channels(count: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, count, 3, 3)}


def save(tensors: dict[str, Tensor], file: Path) -> None:
    """Tensors that share memory are none for safetensors."""
    save_file({name: own.clone() for name, own in tensors.items()}, file)


FLUX = {"double_blocks.0.img_attn.norm.key_norm.scale": ONE, "img_in.weight": torch.zeros(8, 64)}
REFUSED: dict[str, tuple[str, Any, str]] = {
    "LoRA of kohya": ("1", {"lora_unet_down_blocks_0.lora_down.weight": ONE, "x.alpha": ONE}, "is a LoRA.*--lora"),
    "LoRA of PEFT": ("1", {"unet.down_blocks.0.to_q.lora_A.weight": ONE}, "is a LoRA"),
    "LoKr": ("1", {"lycoris_x.lokr_w1": ONE}, "is a LoRA"),
    "LoHa": ("1", {"y_x.hada_w1_a": ONE}, "is a LoRA"),
    "embedding": ("1", {"emb_params": ONE}, "is an embedding of words"),
    "embedding of XL": ("1", {"clip_l": ONE, "clip_g": ONE}, "is an embedding of words"),
    "ControlNet": ("1", {"control_model.input_blocks.0.0.weight": ONE}, "is a ControlNet"),
    "model with a ControlNet": ("1", lambda own: own | {"control_model.x": ONE}, "is a ControlNet"),
    "ControlNet of diffusers": ("1", {"controlnet_cond_embedding.conv_in.weight": ONE}, "is a ControlNet"),
    "autoencoder": ("1", lambda own: bare(VAE, own), "autoencoder alone.*--pretrained_vae_model_name_or_path"),
    "autoencoder with prefix": ("1", lambda own: of(VAE, own), "autoencoder alone"),
    "text encoder": ("1", lambda own: bare("cond_stage_model.transformer.", own), "text encoder alone"),
    "T5": ("1", {"shared.weight": ONE, "encoder.block.0.layer.0.SelfAttention.q.weight": ONE}, "text encoder alone"),
    "UNet of diffusers": ("1", {"conv_in.weight": ONE, "down_blocks.0.resnets.0.norm1.bias": ONE}, "is a UNet alone"),
    "UNet": ("1", lambda own: of(UNET, own), r"without its text encoder \(cond_stage_model"),
    "no encoder of XL": ("xl", lambda own: without("conditioner.embedders.0", own), r"without its text encoder \(cond"),
    "no autoencoder": ("xl", lambda own: without(VAE, own), "Diffusion XL without its autoencoder"),
    "FLUX.1": ("1", FLUX, "denoiser of a model such as black-forest-labs/FLUX.1-schnell.*encoders.*missing"),
    "FLUX.1, all in one": (
        "1",
        {f"model.diffusion_model.{name}": own for name, own in FLUX.items()}
        | {"text_encoders.t5xxl.transformer.shared.weight": ONE, "vae.encoder.conv_in.weight": ONE},
        "FLUX.1-schnell with its text encoders. Their tokenizers are in no such file",
    ),
    "Z-Image": ("1", {"layers.0.adaLN_modulation.0.weight": ONE, "cap_embedder.1.weight": ONE}, "Z-Image-Turbo"),
    "FLUX.2": ("1", {"single_stream_modulation.lin.weight": ONE}, "such as black-forest-labs/FLUX.2-dev"),
    "Qwen-Image": ("1", {"transformer_blocks.0.img_mod.1.weight": ONE}, "no UNet of a Stable Diffusion"),
    "SD 3": (
        "1",
        {"joint_blocks.37.x_block.mlp.fc1.weight": ONE, "text_encoders.clip_l.logit_scale": ONE},
        "stable-diffusion-3.5-large with its text encoders",
    ),
    "refiner": (
        "xl",
        lambda own: {name.replace("embedders.1.", "embedders.0."): v for name, v in own.items()},
        "is the refiner of Stable Diffusion XL",
    ),
    "inpainting": ("1", channels(9), "has 9 input channels, for inpainting, where 4"),
    "instructions": ("xl", channels(8), "has 8 input channels, for edits by instructions"),
    "EDM": ("xl", lambda own: own | {"edm_mean": ONE}, r"was trained in another way.*EDM"),
    "one tensor": ("1", {"x": ONE}, "is no model that is known as a single file.*1 tensors: x"),
    "odd names": ("1", {"../../etc/passwd": ONE, "{0.__class__}": ONE, "%s": ONE}, "is no model that is known"),
    "names that cannot be": ("1", {"a\nb": ONE}, "no tensor can have the name"),
    "nothing": ("1", {}, "it holds no tensors"),
    "fp8": ("1", lambda own: {name: v.to(torch.float8_e4m3fn) for name, v in own.items()}, "is quantized .*F8_E4M3"),
    "8 bits": (
        "1",
        lambda own: own | {f"{UNET}out.2.weight": torch.zeros(4, 4, dtype=torch.int8)},
        "is quantized .*I8",
    ),
    "nf4": ("1", lambda own: own | {f"{UNET}out.2.weight.quant_state.x": ONE}, "is quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_named_before_anything_is_written(
    made: Made, tmp_path: Path, cache: Path, name: str
) -> None:
    kind, change, words = REFUSED[name]
    file = tmp_path / "x.safetensors"
    save(change(load_file(made.file(kind))) if callable(change) else change, file)
    for look in (lambda: check_model(model(file)), lambda: resolved(file)):
        with pytest.raises(UserError, match=words) as told:
            look()
        assert str(file) in str(told.value)
        assert "\n" not in str(told.value)
    assert not cache.exists()


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "a tensor is gone": ("1", lambda own: own.pop(f"{UNET}middle_block.2.out_layers.3.bias"), r"UNet lacks 1 tensors"),
    "another block": (
        "xl",
        lambda own: own.update({f"{UNET}middle_block.3.in_layers.0.bias": ONE}),
        "nothing is known",
    ),
    "an encoder's tensor is gone": (
        "xl",
        lambda own: own.pop("conditioner.embedders.1.model.transformer.resblocks.1.ln_1.bias"),
        "text encoder 2 lacks 1 tensors",
    ),
    "another shape": (
        "1",
        lambda own: own.update({f"{UNET}out.0.bias": torch.zeros(3)}),
        r"conv_norm_out.bias has.*\[3\]",
    ),
    "whole numbers": (
        "1",
        lambda own: own.update({f"{UNET}out.0.bias": torch.zeros(32, dtype=torch.int32)}),
        "where .* of floating-point numbers is expected",
    ),
    "no levels": (
        "1",
        lambda own: [own.pop(name) for name in list(own) if ".op." in name],
        "its UNet is of no known kind",
    ),
    "no attention": (
        "1",
        lambda own: [own.pop(name) for name in list(own) if "transformer_blocks" in name],
        "no attention to the text",
    ),
    "many blocks": (
        "1",
        lambda own: own.update({f"{UNET}input_blocks.{i}.x": ONE for i in range(5000)}),
        "it has 5000 input_blocks",
    ),
    "empty sides": (
        "1",
        lambda own: own.update({f"{UNET}label_emb.0.0.weight": torch.zeros(0, 2**40)} | _vast()),
        "has the shape",
    ),
    "few tokens": (
        "1",
        lambda own: own.update(
            {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(100, 64)}
        ),
        "it knows 100 tokens, and CLIP's tokenizer has 49408",
    ),
    "odd positions": (
        "1",
        lambda own: own.update(
            {"cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": torch.zeros(())}
        ),
        "has the shape",
    ),
    "a query of no shape": (
        "1",
        lambda own: own.update({f"{VAE}encoder.mid.attn_1.q.weight": torch.zeros(())}),
        "to_q",
    ),
    "an autoencoder without levels": (
        "1",
        lambda own: [own.pop(name) for name in list(own) if "encoder.down." in name],
        "its autoencoder is of no known kind",
    ),
}


def _vast() -> dict[str, Tensor]:
    return {f"{UNET}input_blocks.1.0.in_layers.2.weight": torch.zeros(2**40, 0, 3, 3)}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_together_leaves_nothing_in_the_cache(
    made: Made, tmp_path: Path, cache: Path, name: str
) -> None:
    kind, change, words = BROKEN[name]
    tensors, file = load_file(made.file(kind)), tmp_path / "x.safetensors"
    change(tensors)
    save(tensors, file)
    with pytest.raises(UserError, match=words) as told:
        resolved(file)
    assert str(file) in str(told.value)
    assert len(str(told.value)) < 1000
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.ckpt", b"PK\x03\x04whatever", "is a pickle.*never opened"),
        ("x.pt", b"", "is a pickle"),
        ("x.safetensors", b"PK\x03\x04whatever", "is a pickle"),
        ("x.safetensors", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00whatever", "is a pickle"),
        ("x.gguf", b"GGUF\x03\x00\x00\x00", r"is quantized \(GGUF\)"),
        ("x.safetensors", b"GGUF\x03\x00\x00\x00", r"is quantized \(GGUF\)"),
        ("x.safetensors", b"version https://git-lfs", "pointer of git-lfs"),
        ("x.safetensors", b"", "damaged or not a safetensors file"),
        ("x.txt", b"a text about a model, not one", "damaged or not a safetensors file"),
    ],
)
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_other_files(tmp_path: Path, name: str, content: bytes, words: str, allow_pickle: bool) -> None:
    (tmp_path / name).write_bytes(content)
    for path in ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"):
        with pytest.raises(UserError, match=words):
            check_model(Model(**{path: str(tmp_path / name)}, allow_pickle=allow_pickle))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words):
        resolved(tmp_path / name, allow_pickle=allow_pickle)


def test_a_truncated_file(made: Made, tmp_path: Path) -> None:
    file = Path(shutil.copy(made.file("1"), tmp_path / "x.safetensors"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    with pytest.raises(UserError, match=r"x\.safetensors.*damaged"):
        check_model(model(file))


def _headers() -> st.SearchStrategy[dict[str, tuple[int, ...]]]:
    words = [UNET, VAE, "cond_stage_model.model.", "conditioner.embedders.0.transformer.", "input_blocks.", "1.", "0."]
    words += ["op.", "transformer_blocks.", "weight", "lora_A.", "encoder.", "down.", "conv_in.", "joint_blocks."]
    names = st.lists(st.sampled_from(words), min_size=1, max_size=8).map("".join)
    shapes = st.lists(st.sampled_from([0, 1, 4, 64, 2**40, 2**62]), max_size=5).map(tuple)
    return st.dictionaries(names, shapes, max_size=20)


@fuzzed
@given(_headers(), st.booleans())
def test_fuzz_headers_of_models(shapes: dict[str, tuple[int, ...]], begun: bool) -> None:
    start = {f"{UNET}input_blocks.0.0.weight": (32, 4, 3, 3), f"{VAE}x": (), "cond_stage_model.transformer.x": ()}
    contents = Contents(Path("x.safetensors"), {**shapes, **(start if begun else {})}, {})

    def read() -> None:
        kind = recognize(contents)
        configs.unet_config(contents, kind, Prediction())

    assert isinstance(harmless(read), UserError)


# Another autoencoder


@pytest.fixture
def other_vae(made: Made) -> Any:
    """As the pipelines' own, with other numbers."""
    vae = type(made.pipeline("1").vae).from_config(made.pipeline("1").vae.config)
    return vae.requires_grad_(False)


@pytest.mark.parametrize("layout", ["original", "whole model", "diffusers", "old diffusers"])
@pytest.mark.parametrize("base", ["1", "xl"])
def test_an_autoencoder_in_a_file(made: Made, tmp_path: Path, other_vae: Any, layout: str, base: str) -> None:
    own, file = other_vae.state_dict(), tmp_path / "vae.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    match layout:
        case "original":
            own = singlefiles.original_vae(other_vae) | {"loss.logvar": ONE}
        case "whole model":
            whole = {f"{VAE}{name}": tensor for name, tensor in singlefiles.original_vae(other_vae).items()}
            own = without(VAE, load_file(made.file("1"))) | whole
        case "old diffusers":
            for new, name in old.items():
                own = {key.replace(new, name): tensor for key, tensor in own.items()}
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, file)
    check_model(model(made.file(base), pretrained_vae_model_name_or_path=str(file)))
    source = resolved(made.file(base), pretrained_vae_model_name_or_path=str(file))
    family = loading.family_of(source)
    vae = family.load(source, "vae", torch.float32)["vae"]
    expected = other_vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items())
    assert vae.config.scaling_factor == made.pipeline(base).vae.config.scaling_factor
    assert source.model_id.startswith(resolved(made.file(base)).model_id + "+vae:AutoencoderKL@")
    assert resolved(made.file(base), pretrained_vae_model_name_or_path=str(file)).model_id == source.model_id


def test_an_autoencoder_for_a_folder(sd_folder: Path, made: Made, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    vae = loading.family_of(source := resolved(folder)).load(source, "vae", torch.float32)["vae"]
    save_file({name: own + 1 for name, own in vae.state_dict().items()}, tmp_path / "vae.safetensors")
    changed = resolved(folder, pretrained_vae_model_name_or_path=str(tmp_path / "vae.safetensors"))
    found = loading.family_of(changed).load(changed, "vae", torch.float32)["vae"].state_dict()
    assert all(torch.equal(found[name], own + 1) for name, own in vae.state_dict().items())
    with pytest.raises(UserError, match=r"belongs to another kind of model|nothing is known|lacks"):
        resolved(folder, pretrained_vae_model_name_or_path=str(made.file("1")))


def test_a_file_without_an_autoencoder(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"lora_unet_x.lora_down.weight": ONE}, file)
    for look in (check_model, loading.resolve_source):
        with pytest.raises(UserError, match=r"x\.safetensors has no autoencoder.*lora_unet_x"):
            look(model(made.file("1"), pretrained_vae_model_name_or_path=str(file)))


# The cache


def test_models_are_kept_where_downloads_are(made: Made, tmp_path: Path, cache: Path) -> None:
    source = resolved(made.file("1"), cache_dir=tmp_path / "downloads")
    assert Path(source.path).parent == tmp_path / "downloads" / "single_files"
    assert not cache.exists()


def test_too_little_room_is_told_before(made: Made, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(made.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"about the same size \(26 MiB\).*has room for 0 MiB.*--cache_dir"):
        resolved(made.file("1"))
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_disk_that_is_full_is_told_once_and_nothing_is_left(made: Made, cache: Path) -> None:
    file = made.file("1")
    with file_size_limit(2**20), pytest.raises(WriteError, match=r"cannot keep .*1\.safetensors.*--cache_dir"):
        resolved(file)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert Path(resolved(file).path).is_dir()


@pytest.mark.parametrize("damage", ["gone", "cut", "manifest"])
def test_a_folder_that_lost_something_is_made_again(made: Made, cache: Path, damage: str) -> None:
    folder = Path(resolved(made.file("1")).path)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    match damage:
        case "gone":
            weights.unlink()
        case "cut":
            weights.write_bytes(b"")
        case "manifest":
            (folder / "single_file.json").write_text("[", encoding="utf-8")
    assert Path(resolved(made.file("1")).path) == folder
    assert weights.stat().st_size > 1000


def test_what_a_killed_process_left_is_removed(made: Made, cache: Path) -> None:
    folder = Path(resolved(made.file("1")).path)
    left = folder.with_name(f".{folder.name}.1.00000000.tmp")
    folder.rename(left)
    resolved(made.file("1"))
    assert sorted(path.name for path in cache.iterdir() if path.is_dir()) == [folder.name]


def test_two_processes_at_once_convert_once(made: Made, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Each holds the file and would write it; the one that is late finds what the other wrote."""
    file, written = made.file("xl"), tmp_path / "written"

    def slow(*arguments: Any) -> None:
        with written.open("a", encoding="utf-8") as record:
            record.write("x")
        time.sleep(0.5)
        conversion.write_pipeline(*arguments)

    monkeypatch.setattr(resolve, "write_pipeline", slow)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=resolved, args=(file,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert written.read_text(encoding="utf-8") == "x"
    assert resolved(file).path == str(cache / Path(resolved(file).path).name)


def test_a_disk_without_locks(made: Made, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    def refuse(self: Any, timeout: float | None = None) -> Iterator[None]:
        raise OSError(95, "not supported")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert Path(resolved(made.file("1")).path).is_dir()


def test_what_another_user_wrote_does_not_count(made: Made, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamlora.models.single_file import cache as kept

    folder = Path(resolved(made.file("1")).path)
    before = (folder / "single_file.json").stat().st_mtime_ns
    monkeypatch.setattr(kept, "counts", lambda owner, folder: False)
    resolved(made.file("1"))
    assert (folder / "single_file.json").stat().st_mtime_ns != before


def test_all_parts_are_looked_at_before_the_first_is_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = singlefiles.save_original(
        made.pipeline("xl"),
        tmp_path / "x.safetensors",
        **{"conditioner.embedders.1.model.ln_final.bias": None},
    )
    monkeypatch.setattr(conversion, "save_file", lambda *_: pytest.fail("something was written"))
    with pytest.raises(UserError, match="text encoder 2 lacks"):
        resolved(file)


def test_header_is_all_that_is_read_to_recognize_it(made: Made) -> None:
    contents = read_contents(made.file("xl"))
    assert recognize(contents) is STABLE_DIFFUSION_XL
    code = (
        "import sys; from dreamlora.config import Model; from dreamlora.models.local import check_model\n"
        "check_model(Model(pretrained_model_name_or_path=sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(made.file("xl"))], check=True)


# Through the programs


def test_a_run_and_its_samples(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained on a file, drawn with a copy of it that has another name; the original is gone by then."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (72, 80), (60 * number, 90, 200)).save(photos / f"{number}.png")
    file = Path(shutil.copy(made.file("1"), tmp_path / "mine.safetensors"))
    flags = "dreambooth --resolution 64 --max_train_steps 1 --num_inference_steps 1 --sample_steps 0"
    flags += " --eval_steps 1 --final_eval_items 2"
    places = ["--instance_data_dir", str(photos), "--output_dir", str(tmp_path / "run"), "--instance_prompt", "a sks"]
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*flags.split(), *places, "--pretrained_model_name_or_path", str(file)])
    assert noted_id(tmp_path / "run") == resolved(file).model_id
    copy = file.rename(tmp_path / "copy.safetensors")
    drawing = ["sample", "--lora", str(tmp_path / "run"), "--prompts", "a sks", "--output_dir", str(tmp_path / "drawn")]
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*drawing, "--pretrained_model_name_or_path", str(copy)])
    assert (tmp_path / "drawn" / "grid.png").is_file()
    assert "was trained on" not in capsys.readouterr().err  # as is said of another model


def noted_id(run: Path) -> str:
    """The base model's, as the run has noted it."""
    noted: dict[str, str] = json.loads((run / "base_model.json").read_text(encoding="utf-8"))
    return noted["id"]
