"""``dreamlora extract``: of a merged checkpoint it gives the LoRA's ΔW back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreamlora.__main__ import main
from dreamlora.commands.lora_files import read_given
from tests import singlefiles, tinymodels
from tests.commands import adapters


def stock_of(family: str, folder: Path) -> Any:
    options = {"safety_checker": None} if family == "sd" else {}
    return tinymodels.of(family).stock(folder, **options)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def case(request, tiny_folder, tmp_path_factory) -> SimpleNamespace:
    """A base model, a LoRA of ranks up to 3, and both merged."""
    folder, base = tmp_path_factory.mktemp("extract"), tiny_folder(request.param)
    stock = stock_of(request.param, base)
    names = adapters.names_of(stock, request.param)
    weights = adapters.drawn(stock, names)
    lora = adapters.save(folder / "lora.safetensors", weights, names)
    merged = folder / "merged"
    words = [str(lora), "--pretrained_model_name_or_path", str(base), "--output", str(merged)]
    assert main(["merge", *words]) == 0
    return SimpleNamespace(family=request.param, base=base, stock=stock, names=names, weights=weights, merged=merged)


def run(*words: Any) -> int:
    return main(["extract", *map(str, words)])


def check(found: Any, weights: Any, tolerance: float) -> None:
    """The same layers and ΔW."""
    assert found.keys() == weights.keys()
    for component, own in weights.items():
        assert found[component].keys() == own.keys()
        for layer, adapter in own.items():
            expected = adapter.in_precision(torch.float64).delta()
            error = (found[component][layer].delta() - expected).norm() / expected.norm()
            assert error < tolerance, (layer, error)


def test_lora_comes_back(case, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    base = ("--pretrained_model_name_or_path", case.base)
    assert run(case.merged, *base, "--rank", "3", "--output", out) == 0
    found = read_given(out, None)
    assert found.file.format == "diffusers"
    assert found.file.metadata["modelspec.sai_model_spec"] == "1.0.1", "else readers take it for older than ModelSpec"
    check(found.weights, case.weights, 1e-5)


def test_energy_finds_the_rank(case, tmp_path: Path, capsys) -> None:
    out = tmp_path / "lora.safetensors"
    base = ("--pretrained_model_name_or_path", case.base)
    words = ("--energy", "0.9999999", "--format", "kohya", "--json")
    assert run(case.merged, *base, *words, "--output", out) == 0
    told = json.loads(capsys.readouterr().out)
    found = read_given(out, case.names)
    assert found.file.format == "kohya"
    check(found.weights, case.weights, 1e-3)
    for row in told["layers"]:
        component, _, layer = row["layer"].partition(".")
        assert row["rank"] <= case.weights[component][layer].rank
    assert told["not_held"] == []


def test_into_the_base_model_again(case, tmp_path: Path) -> None:
    """The LoRA that was extracted, merged, is the tuned model."""
    out, again = tmp_path / "lora.safetensors", tmp_path / "again"
    base = ("--pretrained_model_name_or_path", case.base)
    assert run(case.merged, *base, "--rank", "3", "--output", out) == 0
    assert main(["merge", str(out), *map(str, base), "--output", str(again)]) == 0
    one, other = (stock_of(case.family, folder) for folder in (case.merged, again))
    for name, tensor in one.unet.state_dict().items():
        torch.testing.assert_close(tensor, other.unet.state_dict()[name], rtol=1e-5, atol=1e-5)


def tuned(case: Any, folder: Path, change: Any) -> Path:
    stock = copy.deepcopy(case.stock)
    with torch.no_grad():
        change(stock)
    stock.save_pretrained(folder)
    return folder


def test_what_no_lora_can_hold_is_named(case, tmp_path: Path, capsys) -> None:
    def change(stock: Any) -> None:
        stock.unet.mid_block.resnets[0].norm1.weight.mul_(1.5)
        stock.unet.mid_block.resnets[0].conv1.bias.add_(1)
        stock.text_encoder.get_input_embeddings().weight.mul_(0.9)
        stock.unet.mid_block.resnets[0].conv1.weight.add_(1e-3)

    folder, out = tuned(case, tmp_path / "tuned", change), tmp_path / "lora.safetensors"
    assert run(folder, "--pretrained_model_name_or_path", case.base, "--rank", "2", "--json", "--output", out) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in told["layers"]] == ["unet.mid_block.resnets.0.conv1"]
    held = {other["tensor"]: other["relative_change"] for other in told["not_held"]}
    assert held.keys() == {
        "unet.mid_block.resnets.0.norm1.weight",
        "unet.mid_block.resnets.0.conv1.bias",
        "text_encoder.embeddings.token_embedding.weight",
    }
    assert held["unet.mid_block.resnets.0.norm1.weight"] == pytest.approx(0.5)
    assert held["text_encoder.embeddings.token_embedding.weight"] == pytest.approx(0.1)
    assert told["equal_layers"] > 50
    out.unlink()
    assert run(folder, "--pretrained_model_name_or_path", case.base, "--rank", "2", "--output", out) == 0
    text = capsys.readouterr().out
    assert "layers do not differ, and are left out" in text
    assert "not in the LoRA, as none can hold it: 3 tensors with" in text


def test_nothing_but_that(case, tmp_path: Path, capsys) -> None:
    folder = tuned(case, tmp_path / "tuned", lambda stock: stock.unet.conv_norm_out.weight.mul_(2))
    out = tmp_path / "lora.safetensors"
    assert run(folder, "--pretrained_model_name_or_path", case.base, "--rank", "2", "--output", out) == 2
    assert "only in what no LoRA can hold (1 tensors: unet.conv_norm_out.weight)" in capsys.readouterr().err
    assert run(case.base, "--pretrained_model_name_or_path", case.base, "--rank", "2", "--output", out) == 2
    assert "there is nothing to extract" in capsys.readouterr().err
    assert not out.exists()


def test_a_lower_precision_is_no_difference(case, tmp_path: Path, capsys) -> None:
    """A model in bf16 is its base in fp32, rounded."""
    folder = tmp_path / "bf16"
    copy.deepcopy(case.stock).to(torch.bfloat16).save_pretrained(folder)
    out = tmp_path / "lora.safetensors"
    assert run(folder, "--pretrained_model_name_or_path", case.base, "--rank", "2", "--output", out) == 2
    assert "does not differ from" in capsys.readouterr().err


def test_other_architectures(tiny_folder, tmp_path: Path, capsys) -> None:
    out = tmp_path / "lora.safetensors"
    words = ("--pretrained_model_name_or_path", tiny_folder("sd"), "--rank", "2", "--output", out)
    assert run(tiny_folder("sdxl"), *words) == 2
    assert "is of the family sd, and" in capsys.readouterr().err
    folder = tmp_path / "wide"
    stock = stock_of("sd", tiny_folder("sd"))
    config = {**stock.unet.config, "block_out_channels": [2 * width for width in stock.unet.config.block_out_channels]}
    stock.unet = type(stock.unet).from_config(config)
    stock.save_pretrained(folder)
    assert run(folder, *words) == 2
    assert "are of different architectures" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["1", "2", "xl"])
@pytest.mark.parametrize("mixed", [False, True])
def test_single_files(kind: str, mixed: bool, tmp_path: Path) -> None:
    """Two of them; or one and a folder."""
    pipeline = singlefiles.pipeline(kind, tmp_path / "tokenizers")
    base = singlefiles.save_original(pipeline, tmp_path / "base.safetensors")
    names = adapters.names_of(pipeline, "sdxl" if kind == "xl" else "sd")
    weights = adapters.drawn(pipeline, names)
    for component in names.text_encoders:
        if "text_projection.weight" not in getattr(pipeline, component).state_dict():
            weights[component].pop("text_projection", None)
    lora = adapters.save(tmp_path / "lora.safetensors", weights, names)
    merged = tmp_path / ("merged" if mixed else "merged.safetensors")
    words = ["--pretrained_model_name_or_path", str(base), "--output", str(merged)]
    assert main(["merge", str(lora), *words]) == 0
    out = tmp_path / "out.safetensors"
    assert run(merged, "--pretrained_model_name_or_path", base, "--rank", "3", "--output", out) == 0
    check(read_given(out, None).weights, weights, 1e-5)
