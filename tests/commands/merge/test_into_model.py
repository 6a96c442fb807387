"""``dreamlora merge`` into a base model: what comes out is load + scale, and nothing else has changed."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamlora.__main__ import main
from dreamlora.commands.merge import into_model
from dreamlora.commands.merge.flags import MergeConfig
from dreamlora.commands.written_lora import Written
from dreamlora.config import Model
from dreamlora.models.loading import resolve_source
from tests import singlefiles, tinymodels
from tests.commands import adapters
from tests.families.layers.test_names import image

FAMILIES = ("sd", "sdxl", "flux", "sd3")
STRENGTHS = (1.0, -0.5)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny_folder) -> SimpleNamespace:
    tiny, folder = tinymodels.of(request.param), tiny_folder(request.param)
    stock = _stock(tiny, folder)
    return SimpleNamespace(name=request.param, family=request.param, tiny=tiny, folder=folder, stock=stock)


def _stock(tiny: Any, folder: Path) -> Any:
    options = {"safety_checker": None} if (folder / "safety_checker").is_dir() else {}
    stock = tiny.stock(folder, **options)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture
def two(case, tmp_path: Path) -> SimpleNamespace:
    """Two LoRAs in different formats, with their weights."""
    names = adapters.names_of(case.stock, case.family)
    weights = [adapters.drawn(case.stock, names, seed=seed) for seed in (1, 2)]
    files = [
        adapters.save(tmp_path / f"{form}.safetensors", own, names, form)
        for own, form in zip(weights, ("diffusers", "kohya"), strict=True)
    ]
    return SimpleNamespace(names=names, weights=weights, files=[str(file) for file in files])


def run(*words: Any) -> int:
    return main(["merge", *map(str, words)])


def test_it_is_load_and_scale(case, two, tmp_path: Path, capsys) -> None:
    out = tmp_path / "merged"
    base = ("--pretrained_model_name_or_path", case.folder)
    assert run(*two.files, *base, "--lora_scales", *STRENGTHS, "--output", out) == 0
    merged = _stock(case.tiny, out)
    loras = dict(enumerate(zip(two.weights, STRENGTHS, strict=True)))
    expected = adapters.merged_by_hand(case.stock, two.names, loras)
    for component, layers in adapters.adaptable(merged, two.names).items():
        for name, layer in layers.items():
            torch.testing.assert_close(layer.weight.double(), expected[component][name], rtol=1e-6, atol=1e-6)
    loaded = copy.deepcopy(case.stock)
    for number, weights in enumerate(two.weights):  # in the format that all stock pipelines read
        file = adapters.save(tmp_path / f"{number}.safetensors", weights, two.names)
        loaded.load_lora_weights(file, adapter_name=f"n{number}")
    loaded.set_adapters(["n0", "n1"], list(STRENGTHS))
    torch.testing.assert_close(image(case, merged), image(case, loaded), rtol=0, atol=1e-4)
    assert (image(case, merged) - image(case, case.stock)).abs().max() > 1e-2
    text = capsys.readouterr().out
    assert "diffusers.safetensors x 1 (LoRA)" in text and "kohya.safetensors x -0.5 (LoRA)" in text
    assert text.splitlines()[-1].startswith(f"{out}: ")


def test_all_else_is_as_it_was(case, two, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    only = two.weights[0][two.names.denoiser]
    file = adapters.save(tmp_path / "one.safetensors", {two.names.denoiser: only}, two.names)
    assert run(file, "--pretrained_model_name_or_path", case.folder, "--output", out) == 0
    for path in (path for path in case.folder.rglob("*") if path.is_file()):
        copied = out / path.relative_to(case.folder)
        if path.name == "model_index.json":
            assert json.loads(path.read_text()) == json.loads(copied.read_text())
        elif path.parent.name != two.names.denoiser or path.suffix == ".json":
            assert path.read_bytes() == copied.read_bytes(), path
    before, after = (
        load_file(next((folder / two.names.denoiser).glob("*.safetensors"))) for folder in (case.folder, out)
    )
    weights = {f"{layer}.weight" for layer in only}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in weights), name


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_other_kinds(case, kind: str, tmp_path: Path) -> None:
    names = adapters.names_of(case.stock, case.family)
    weights = adapters.drawn(case.stock, names, kind=kind)
    file = adapters.save(tmp_path / "a.safetensors", weights, names, "kohya")
    out = tmp_path / "merged"
    base = ("--pretrained_model_name_or_path", case.folder)
    assert run(file, *base, "--lora_scales", "0.7", "--output", out) == 0
    expected = adapters.merged_by_hand(case.stock, names, {0: (weights, 0.7)})
    merged = _stock(case.tiny, out)
    for component, layers in adapters.adaptable(merged, names).items():
        for name, layer in layers.items():
            torch.testing.assert_close(layer.weight.double(), expected[component][name], rtol=1e-5, atol=1e-5)


@pytest.fixture
def bf16(case, tmp_path: Path) -> Path:
    folder = tmp_path / "bf16"
    copy.deepcopy(case.stock).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_bf16_is_rounded_once(case, bf16: Path, two, tmp_path: Path, capsys) -> None:
    """All is added up in float32 before; how much rounding changes is told."""
    out = tmp_path / "merged"
    base = ("--pretrained_model_name_or_path", bf16)
    assert run(*two.files, *base, "--lora_scales", *STRENGTHS, "--output", out) == 0
    told = re.search(r"an error of ([0-9.]+)% of what the LoRAs change", capsys.readouterr().out)
    before = _stock(case.tiny, bf16)
    loras = dict(enumerate(zip(two.weights, STRENGTHS, strict=True)))
    rounded = copy.deepcopy(case.stock)
    for component, layers in adapters.adaptable(rounded, two.names).items():
        for name, layer in layers.items():
            layer.weight.data = adapters.adaptable(before, two.names)[component][name].weight.data
    expected = adapters.merged_by_hand(rounded, two.names, loras)
    lost = change = 0.0
    files = {component: load_file(next((out / component).glob("*.safetensors"))) for component in expected}
    for component, layers in expected.items():
        stored = {name.removeprefix("text_model."): tensor for name, tensor in files[component].items()}
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        wrong = total = 0
        base = adapters.adaptable(before, two.names)[component]
        for name, weight in layers.items():
            wrong += int((stored[f"{name}.weight"] != weight.float().bfloat16()).sum())
            total += weight.numel()
            lost += float((stored[f"{name}.weight"].double() - weight).square().sum())
            change += float((weight - base[name].weight.double()).square().sum())
        assert wrong < 1e-3 * total  # float32's rounding turns the balance now and then
    assert told and float(told[1]) == pytest.approx(100 * (lost / change) ** 0.5, abs=0.06)


def test_another_precision(case, bf16: Path, two, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    base = ("--pretrained_model_name_or_path", bf16)
    assert run(two.files[0], *base, "--dtype", "fp32", "--output", out) == 0
    for component in (two.names.denoiser, *two.names.text_encoders):
        tensors = load_file(next((out / component).glob("*.safetensors")))
        assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    merged = _stock(case.tiny, out)
    assert {getattr(merged, name).dtype for name in (two.names.denoiser, *two.names.text_encoders)} == {torch.float32}
    vae = load_file(next((out / "vae").glob("*.safetensors")))
    assert {tensor.dtype for tensor in vae.values()} == {torch.bfloat16}  # of which nothing was said


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_several_files_stay_several(case, two, tmp_path: Path, variant: str | None) -> None:
    sharded, out, whole = tmp_path / "sharded", tmp_path / "merged", tmp_path / "whole"
    case.stock.save_pretrained(sharded, max_shard_size="100KB", variant=variant)
    more = ["--variant", variant] if variant else []
    assert run(*two.files, "--pretrained_model_name_or_path", sharded, *more, "--output", out) == 0
    assert run(*two.files, "--pretrained_model_name_or_path", case.folder, "--output", whole) == 0
    denoiser = two.names.denoiser
    count = len(list((sharded / denoiser).glob("*.safetensors")))
    assert len(list((out / denoiser).glob("*.safetensors"))) == count > 1
    index = json.loads((out / denoiser / "diffusion_pytorch_model.safetensors.index.json").read_text())
    sizes = [tensor.nbytes for file in (out / denoiser).glob("*.safetensors") for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    one, other = (_stock(case.tiny, folder) for folder in (out, whole))
    for part in (denoiser, *two.names.text_encoders):
        expected = getattr(other, part).state_dict()
        for name, tensor in getattr(one, part).state_dict().items():
            assert torch.equal(tensor, expected.pop(name)), f"{part}.{name}"
        assert not expected, part
    # Some processors round by where in memory a weight begins, and that depends on the file that it came in: 3e-7.
    torch.testing.assert_close(image(case, one), image(case, other), rtol=0, atol=1e-5)


class Single(SimpleNamespace):
    """A single file, its pipeline, and a LoRA for it."""

    file: Path
    pipeline: Any


@pytest.fixture(scope="module", params=["1", "2", "xl"])
def single(request, tmp_path_factory) -> Single:
    folder = tmp_path_factory.mktemp("single")
    pipeline = singlefiles.pipeline(request.param, folder / "tokenizers").to(torch.bfloat16)
    metadata = {"modelspec.title": "mine", "modelspec.hash_sha256": "0x1", "other": "stays"}
    file = singlefiles.save_original(pipeline, folder / "model.safetensors", metadata)
    family = "sdxl" if request.param == "xl" else "sd"
    names = adapters.names_of(pipeline, family)
    weights = adapters.drawn(pipeline, names)
    for component in names.text_encoders:  # its projection is not in all of them
        has = getattr(pipeline, component).state_dict()
        if "text_projection.weight" not in has:
            weights[component].pop("text_projection", None)
    lora = adapters.save(folder / "lora.safetensors", weights, names)
    return Single(file=file, pipeline=pipeline, lora=lora, names=names, weights=weights)


def test_single_file_is_what_its_folder_is(single: Single, tmp_path: Path) -> None:
    """Merged as a file, and then converted: the same as converted, and merged then."""
    base = ("--pretrained_model_name_or_path", single.file)
    file, folder = tmp_path / "merged.safetensors", tmp_path / "merged"
    assert run(single.lora, *base, "--lora_scales", "0.5", "--output", file) == 0
    assert run(single.lora, *base, "--lora_scales", "0.5", "--output", folder) == 0
    converted = Path(resolve_source(Model(pretrained_model_name_or_path=str(file))).path)
    changed = 0
    for path in sorted(folder.rglob("*.safetensors")):
        one, other = load_file(path), load_file(converted / path.relative_to(folder))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert tensor.dtype == other[name].dtype == torch.bfloat16 and torch.equal(tensor, other[name]), name
        changed += len(one)
    assert changed > 100


def test_rest_of_a_single_file_stays(single: Single, tmp_path: Path) -> None:
    file = tmp_path / "merged.safetensors"
    only = {single.names.denoiser: single.weights[single.names.denoiser]}
    lora = adapters.save(tmp_path / "unet.safetensors", only, single.names)
    assert run(lora, "--pretrained_model_name_or_path", single.file, "--output", file) == 0
    before, after = load_file(single.file), load_file(file)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        if not name.startswith("model.diffusion_model.") or not name.endswith(".weight") or tensor.ndim < 2:
            assert torch.equal(tensor, after[name]), name
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata == {
        "modelspec.title": "mine",
        "other": "stays",
        "modelspec.merged_from": "unet.safetensors x 1",
    }


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def other(weights: Any, names: Any, change: Any) -> Any:
    weights = {component: dict(layers) for component, layers in weights.items()}
    change(weights, names)
    return weights


def _unknown_layer(weights: Any, names: Any) -> None:
    weights[names.denoiser]["nowhere.to_q"] = next(iter(weights[names.denoiser].values()))


def _other_size(weights: Any, names: Any) -> None:
    layers = weights[names.denoiser]
    first = next(iter(layers))
    last = next(name for name in reversed(layers) if layers[name].delta().shape != layers[first].delta().shape)
    layers[first] = layers[last]


def _other_part(weights: Any, names: Any) -> None:
    weights["text_encoder_9"] = dict(weights["text_encoder"])


WRONG = {
    "unknown layer": (_unknown_layer, r"has no layer nowhere.to_q"),
    "other size": (_other_size, r"has weights of \(.*\), and the LoRA is for \(.*\)"),
    "other part": (_other_part, r"is also for the text_encoder_9, and .* has none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_before_anything_is_written(case, two, name: str, tmp_path: Path, capsys) -> None:
    change, message = WRONG[name]
    file = adapters.save(tmp_path / "bad.safetensors", other(two.weights[0], two.names, change), two.names)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "merged"
    assert run(file, "--pretrained_model_name_or_path", case.folder, "--output", out) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "bad.safetensors" in error
    assert re.search(message, error), error
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten(case, two, tmp_path: Path, capsys) -> None:
    base = ("--pretrained_model_name_or_path", case.folder)
    before = sums(case.folder)
    assert run(*two.files, *base, "--output", case.folder) == 2
    assert "something lies there already" in capsys.readouterr().err
    assert sums(case.folder) == before


def test_a_folder_is_not_written_as_a_file(case, two, tmp_path: Path, capsys) -> None:
    base = ("--pretrained_model_name_or_path", case.folder)
    assert run(*two.files, *base, "--output", tmp_path / "x.safetensors") == 2
    assert "is a single file, and" in capsys.readouterr().err


def test_too_little_room(case, two, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**24 + 1000))
    base = ("--pretrained_model_name_or_path", case.folder)
    assert run(*two.files, *base, "--output", tmp_path / "merged") == 2
    assert "of free disk, and there are 16.00 MiB" in capsys.readouterr().err


def test_numbers_that_are_too_large(case, two, tmp_path: Path, capsys) -> None:
    base = ("--pretrained_model_name_or_path", case.folder)
    out = tmp_path / "merged"
    assert run(*two.files, *base, "--lora_scales", "1e6", "--dtype", "fp16", "--output", out) == 2
    assert "does not fit float16 any more" in capsys.readouterr().err
    assert not out.exists() and not list(tmp_path.glob(".merged*"))


def test_quantised_weights_are_refused(case, two, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "float8"
    case.stock.save_pretrained(folder)
    file = next((folder / two.names.denoiser).glob("*.safetensors"))
    tensors: dict[str, Tensor] = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim > 1 else tensor for name, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    assert run(*two.files, "--pretrained_model_name_or_path", folder, "--output", tmp_path / "merged") == 2
    assert "is of type F8_E4M3: quantised weights have no room" in capsys.readouterr().err


def test_interrupted(case, two, tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C in the middle leaves nothing."""
    calls = []

    def interrupted(*given: Any) -> Tensor:
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return given[0]

    monkeypatch.setattr(into_model, "added", interrupted)
    out = tmp_path / "merged"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        into_model.merge_into_model(_config(two.files, case.folder, out))
    assert sorted(tmp_path.iterdir()) == before


def _config(files: list[str], folder: Path, out: Path) -> Any:
    paths = tuple(map(Path, files))
    return MergeConfig(lora=paths, pretrained_model_name_or_path=str(folder), written=Written(output=out))
