"""``dreamlora resize``: exact at full rank, and what is lost below it is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dreamlora.__main__ import main
from dreamlora.commands.lora_files import read_given
from dreamlora.lora.formats import diffusers
from dreamlora.lora.saving import save_content
from dreamlora.lora.weights import AdapterWeights
from tests import singlefiles, tinymodels
from tests.commands import adapters


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def case(request, tmp_path_factory) -> SimpleNamespace:
    kind = {"sd": "1", "sdxl": "xl"}[request.param]
    stock = singlefiles.pipeline(kind, tmp_path_factory.mktemp("tokenizers"))
    names = adapters.names_of(stock, request.param)
    return SimpleNamespace(stock=stock, names=names, weights=adapters.drawn(stock, names), family=request.param)


def run(*words: Any) -> int:
    return main(["resize", *map(str, words)])


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_full_rank_is_exact(case, form: str, tmp_path: Path) -> None:
    file = adapters.save(tmp_path / "lora.safetensors", case.weights, case.names, form)
    out = tmp_path / "same.safetensors"
    assert run(file, "--rank", "3", "--output", out) == 0
    before, after = load_file(file), load_file(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("words", [("--rank", "1"), ("--energy", "0.7"), ("--sv_ratio", "1.5")])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_what_is_lost_is_the_discarded_singular_values(case, form: str, words, tmp_path: Path, capsys) -> None:
    file = adapters.save(tmp_path / "lora.safetensors", case.weights, case.names, form)
    out = tmp_path / "small.safetensors"
    assert run(file, *words, "--json", "--output", out) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["layer"]: row for row in told["layers"]}
    before, after = (read_given(path, case.names).weights for path in (file, out))
    whole = lost = 0.0
    for component, own in before.items():
        assert after[component].keys() == own.keys()
        for layer, adapter in own.items():
            delta = adapter.in_precision(torch.float64).delta().flatten(1)
            values = torch.linalg.svdvals(delta)
            row, small = rows[f"{component}.{layer}"], after[component][layer]
            assert row["rank"] == small.rank <= adapter.rank
            error = float(values[small.rank :].norm())
            assert float((small.delta().flatten(1) - delta).norm()) == pytest.approx(
                error, abs=1e-5 * float(delta.norm())
            )
            assert row["relative_error"] == pytest.approx(error / float(delta.norm()), abs=1e-6)
            if small.rank < adapter.rank and words[0] == "--energy":
                assert float(values[: small.rank].square().sum()) >= 0.7 * float(values.square().sum())
            whole, lost = whole + float(delta.square().sum()), lost + error**2
    assert told["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert told["bytes"] == out.stat().st_size < file.stat().st_size == told["bytes_before"]


def test_table_names_every_layer_and_the_whole(case, tmp_path: Path, capsys) -> None:
    file = adapters.save(tmp_path / "lora.safetensors", case.weights, case.names)
    out = tmp_path / "small.safetensors"
    assert run(file, "--rank", "1", "--output", out) == 0
    lines = capsys.readouterr().out.splitlines()
    layers = sum(map(len, case.weights.values()))
    assert len(lines) == layers + 3
    assert lines[0].split() == ["layer", "rank", "alpha", "|ΔW|", "kept", "energy", "relative", "error"]
    assert lines[-2].startswith(f"{layers} layers: rank 1 to 3 -> 1, ")
    assert lines[-1].startswith(f"{out}: ")


def test_header_stays_but_for_what_is_not_true_any_more(case, tmp_path: Path) -> None:
    content = diffusers.write(case.weights)
    content.metadata.update({"modelspec.title": "mine", "modelspec.hash_sha256": "0x1", "ss_network_dim": "3"})
    file = save_content(tmp_path / "lora.safetensors", content)
    out = tmp_path / "small.safetensors"
    assert run(file, "--rank", "1", "--output", out) == 0
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.title"] == "mine" and "modelspec.hash_sha256" not in metadata
    assert metadata["ss_network_dim"] == "1"
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert settings["unet.r"] == 1


def test_doras_keep_their_magnitudes(case, tmp_path: Path) -> None:
    dora = adapters.drawn(case.stock, case.names, kind="dora")
    file = adapters.save(tmp_path / "dora.safetensors", dora, case.names, "kohya")
    out = tmp_path / "small.safetensors"
    assert run(file, "--rank", "1", "--output", out) == 0
    after: AdapterWeights = read_given(out, case.names).weights
    for component, own in dora.items():
        for layer, adapter in own.items():
            small = after[component][layer]
            assert small.rank == 1 and torch.equal(small.magnitude, adapter.magnitude)


def test_into_another_format_and_precision(case, tmp_path: Path) -> None:
    file = adapters.save(tmp_path / "lora.safetensors", case.weights, case.names, "kohya")
    out = tmp_path / "small.safetensors"
    assert run(file, "--rank", "2", "--format", "diffusers", "--dtype", "fp16", "--output", out) == 0
    found = read_given(out, None)
    assert found.file.format == "diffusers"
    for component, own in case.weights.items():
        for layer, adapter in own.items():
            small = found.weights[component][layer]
            assert small.up.dtype == torch.float16
            if adapter.rank <= 2:
                torch.testing.assert_close(small.delta(), adapter.delta(), rtol=2e-2, atol=2e-3)


def test_mistakes(case, tmp_path: Path, capsys) -> None:
    file = adapters.save(tmp_path / "lora.safetensors", case.weights, case.names)
    for words, message in (
        ([file, "--output", tmp_path / "x.safetensors"], "to which rank?"),
        ([file, "--rank", "2"], "--output is needed"),
        ([file, "--rank", "2", "--output", file], "something lies there already"),
        ([file, "--rank", "2", "--format", "kohya", "--output", tmp_path / "x.safetensors"], "give --family"),
        ([tmp_path / "no.safetensors", "--rank", "2", "--output", tmp_path / "x.safetensors"], "no such LoRA file"),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    assert list(tmp_path.iterdir()) == [file]


def test_names_of_layers_that_no_published_model_has(tiny_folder, tmp_path: Path, capsys) -> None:
    """The small UNet has fewer blocks; its base model tells."""
    stock = tinymodels.of("sdxl").stock(tiny_folder("sdxl"))
    names = adapters.names_of(stock, "sdxl")
    weights = {"unet": adapters.drawn(stock, names)["unet"]}
    file, out = adapters.save(tmp_path / "lora.safetensors", weights, names, "kohya"), tmp_path / "out.safetensors"
    assert run(file, "--rank", "1", "--output", out) == 2
    assert "lora.safetensors" in capsys.readouterr().err
    base = ("--pretrained_model_name_or_path", tiny_folder("sdxl"))
    assert run(file, "--rank", "1", *base, "--output", out) == 0
    assert {adapter.rank for adapter in read_given(out, names).weights["unet"].values()} == {1}


def test_loha_becomes_a_lora_of_a_lower_rank(case, tmp_path: Path, capsys) -> None:
    """Its own rank r is one of r² in a LoRA."""
    loha = {"text_encoder": adapters.drawn(case.stock, case.names, kind="loha")["text_encoder"]}
    file = adapters.save(tmp_path / "loha.safetensors", loha, case.names, "kohya")
    out = tmp_path / "lora.safetensors"
    words = ("--family", case.family, "--format", "diffusers", "--energy", "1", "--output", out)
    assert run(file, *words) == 0
    found = read_given(out, None).weights["text_encoder"]
    for layer, adapter in loha["text_encoder"].items():
        assert (found[layer].kind, found[layer].rank) == ("lora", adapter.rank**2)
        torch.testing.assert_close(found[layer].delta(), adapter.delta(), rtol=1e-4, atol=1e-5)
