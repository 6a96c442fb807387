"""``dreamlora merge`` without a base model: several LoRAs become one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dreamlora.__main__ import main
from dreamlora.commands.lora_files import read_given
from tests import singlefiles
from tests.commands import adapters

STRENGTHS = (1.0, -0.5, 0.25)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def case(request, tmp_path_factory) -> SimpleNamespace:
    """Three LoRAs in several formats; the last is of the denoiser alone."""
    folder = tmp_path_factory.mktemp("loras")
    stock = singlefiles.pipeline({"sd": "1", "sdxl": "xl"}[request.param], folder / "tokenizers")
    stock.save_pretrained(folder / "base")
    names = adapters.names_of(stock, request.param)
    weights = [adapters.drawn(stock, names, seed=seed) for seed in range(3)]
    weights[2] = {names.denoiser: weights[2][names.denoiser]}
    files = [
        adapters.save(folder / f"{number}-{form}.safetensors", own, names, form)
        for number, (own, form) in enumerate(zip(weights, ("diffusers", "kohya", "comfyui"), strict=True))
    ]
    return SimpleNamespace(
        family=request.param, stock=stock, names=names, weights=weights, files=files, folder=folder / "base"
    )


def run(*words: Any) -> int:
    return main(["merge", *map(str, words)])


def sum_of(case: Any, component: str, layer: str) -> torch.Tensor:
    deltas = [
        strength * weights[component][layer].in_precision(torch.float64).delta()
        for weights, strength in zip(case.weights, STRENGTHS, strict=True)
        if layer in weights.get(component, {})
    ]
    return torch.stack(deltas).sum(0)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_it_is_the_sum(case, form: str, tmp_path: Path) -> None:
    out = tmp_path / "one.safetensors"
    assert run(*case.files, "--lora_scales", *STRENGTHS, "--format", form, "--output", out) == 0
    found = read_given(out, case.names)
    assert found.file.format == form
    layers = 0
    for component, own in case.weights[0].items():
        assert found.weights[component].keys() == own.keys()
        for layer in own:
            total = sum_of(case, component, layer)
            adapter = found.weights[component][layer]
            torch.testing.assert_close(adapter.delta().double(), total, rtol=1e-5, atol=1e-6)
            assert adapter.rank == sum(w[component][layer].rank for w in case.weights if layer in w.get(component, {}))
            layers += 1
    assert layers > 50
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["modelspec.merged_from"] == (
            "0-diffusers.safetensors x 1, 1-kohya.safetensors x -0.5, 2-comfyui.safetensors x 0.25"
        )


def test_first_format_and_precision_count(case, tmp_path: Path) -> None:
    out = tmp_path / "one.safetensors"
    assert run(*case.files[1:], "--dtype", "bf16", "--output", out) == 0
    found = read_given(out, case.names)
    assert found.file.format == "kohya"
    assert {adapter.up.dtype for own in found.weights.values() for adapter in own.values()} == {torch.bfloat16}


@pytest.mark.parametrize("bound", [("--rank", "2"), ("--energy", "0.8")])
def test_lower_rank_is_the_best_there_is(case, bound: tuple[str, str], tmp_path: Path, capsys) -> None:
    out = tmp_path / "one.safetensors"
    assert run(*case.files, "--lora_scales", *STRENGTHS, *bound, "--json", "--output", out) == 0
    told = {row["layer"]: row for row in json.loads(capsys.readouterr().out)["layers"]}
    found = read_given(out, case.names)
    for component, own in case.weights[0].items():
        for layer in own:
            total = sum_of(case, component, layer)
            values = torch.linalg.svdvals(total.flatten(1))
            adapter = found.weights[component][layer]
            assert adapter.rank is not None
            lost = float(values[adapter.rank :].norm())
            row = told[f"{component}.{layer}"]
            assert row["rank"] == adapter.rank
            assert float((adapter.delta() - total).norm()) == pytest.approx(lost, abs=1e-5 * float(total.norm()))
            assert row["relative_error"] == pytest.approx(lost / float(total.norm()), abs=1e-5)
            if bound[0] == "--energy":
                assert row["kept_energy"] >= 0.8 - 1e-9
            else:
                assert adapter.rank <= 2


def test_same_image_as_into_the_model(case, tmp_path: Path) -> None:
    """Weights: both ways lead to the same model."""
    one, direct, through = tmp_path / "one.safetensors", tmp_path / "direct", tmp_path / "through"
    base = ("--pretrained_model_name_or_path", case.folder)
    assert run(*case.files, "--lora_scales", *STRENGTHS, "--output", one) == 0
    assert run(*case.files, *base, "--lora_scales", *STRENGTHS, "--output", direct) == 0
    assert run(one, *base, "--output", through) == 0
    for file in (direct / case.names.denoiser).glob("*.safetensors"):
        with safe_open(file, "pt") as first, safe_open(through / case.names.denoiser / file.name, "pt") as second:
            for name in first.keys():  # noqa: SIM118 - no iterator
                torch.testing.assert_close(first.get_tensor(name), second.get_tensor(name), rtol=1e-5, atol=1e-5)


def test_doras_need_their_base_model(case, tmp_path: Path, capsys) -> None:
    dora = adapters.drawn(case.stock, case.names, kind="dora")
    file = adapters.save(tmp_path / "dora.safetensors", dora, case.names, "kohya")
    out = tmp_path / "one.safetensors"
    assert run(case.files[0], file, "--output", out) == 2
    error = capsys.readouterr().err
    assert "dora.safetensors" in error and "it is a DoRA" in error and "merge it into its base model" in error
    assert not out.exists()


def test_loha_becomes_a_lora(case, tmp_path: Path) -> None:
    linear = {"text_encoder": adapters.drawn(case.stock, case.names, kind="loha")["text_encoder"]}
    file = adapters.save(tmp_path / "loha.safetensors", linear, case.names, "kohya")
    out = tmp_path / "one.safetensors"
    assert run(file, "--lora_scales", "0.5", "--family", case.family, "--format", "diffusers", "--output", out) == 0
    found = read_given(out, case.names).weights["text_encoder"]
    for layer, adapter in linear["text_encoder"].items():
        torch.testing.assert_close(found[layer].delta(), 0.5 * adapter.delta(), rtol=1e-4, atol=1e-5)


MISTAKES = {
    "several scales": (["--lora_scales", "1", "2"], "takes one number, or one for each of the 3 LoRAs (got 2)"),
    "no such file": (["--lora", "nowhere.safetensors"], "no such LoRA file or folder: nowhere.safetensors"),
    "no safetensors": (["--output", "nowhere/x.bin"], "a LoRA in the format diffusers is a .safetensors file"),
    "no format": (["--format", "komfy"], "--format: unknown name 'komfy'"),
    "energy": (["--energy", "99"], "--energy is a share above 0, and 1 at most (got 99.0)"),
    "rank": (["--rank", "0"], "--rank must be at least 1 (got 0)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(case, name: str, tmp_path: Path, capsys) -> None:
    words, message = MISTAKES[name]
    assert run(*case.files, "--output", tmp_path / "one.safetensors", *words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_convolutions_whose_kernel_is_not_told(case, tmp_path: Path, capsys) -> None:
    whole = adapters.drawn(case.stock, case.names, kind="loha")
    file = adapters.save(tmp_path / "loha.safetensors", whole, case.names, "kohya")
    assert run(file, case.files[0], "--output", tmp_path / "one.safetensors") == 2
    error = capsys.readouterr().err
    assert "loha.safetensors: how large the kernel of the convolution" in error and "into its base model" in error
