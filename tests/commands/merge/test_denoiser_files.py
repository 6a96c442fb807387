"""Files of a denoiser alone, by the names of its original code, as ComfyUI's diffusion_models/ has them: merged into as
the folder is, and extracted from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamlora import registry
from dreamlora.__main__ import main
from dreamlora.commands import base_model
from dreamlora.commands.lora_files import read_given
from dreamlora.lora.names import ModelNames, model_names
from tests import tinymodels
from tests.commands import adapters

FAMILIES = [name for name in registry.names("families.layers") if name not in ("sd", "sdxl")]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    tiny, base = tinymodels.of(request.param), tiny_folder(request.param)
    stock, folder = tiny.stock(base), tmp_path_factory.mktemp("files")
    names = adapters.names_of(stock, request.param)
    if not names.comfyui:
        pytest.skip("ComfyUI does not have it")
    file = folder / "denoiser.safetensors"
    save_file(original(getattr(stock, names.denoiser), names), file, {"title": "mine"})
    weights = {names.denoiser: adapters.drawn(stock, names)[names.denoiser]}
    lora = adapters.save(folder / "lora.safetensors", weights, names)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "lumina2":  # the small model has other heads than the only published one
            patch.setattr(base_model, "model_names", lambda family, config: known(family, case.names, config))
        case = SimpleNamespace(family=request.param, base=base, names=names, file=file, lora=lora, weights=weights)
        yield case


def known(family: str, names: ModelNames, config: Any) -> ModelNames | None:
    return names if family == "lumina2" else model_names(family, config)


def original(module: Any, names: Any) -> dict[str, Tensor]:
    """All weights that have a name in the original code, and beside them what else such a file may hold."""
    layers = dict(module.named_modules())
    tensors: dict[str, Tensor] = {"model.diffusion_model.some.scale": torch.ones(3), "vae.x.weight": torch.ones(2, 2)}
    for name in layers:
        place = names.layers.of_layer(name)
        if place is None or not hasattr(layers[name], "weight"):
            continue
        for kind in ("weight", "bias"):
            parts = [getattr(layers[part], kind, None) for part in place.layers if part in layers]
            if any(part is None for part in parts) or len(parts) < len(place.layers):
                continue
            whole = torch.cat([part.detach() for part in parts])
            if place.original.swapped:
                whole = torch.cat(whole.chunk(2)[::-1])
            tensors[f"model.diffusion_model.{place.name}.{kind}"] = whole.clone()
    return tensors


def run(command: str, *words: Any) -> int:
    return main([command, *map(str, words)])


def test_it_is_what_the_folder_is(case, tmp_path: Path) -> None:
    file, folder = tmp_path / "merged.safetensors", tmp_path / "merged"
    for base, output in ((case.file, file), (case.base, folder)):
        words = ("--pretrained_model_name_or_path", base, "--lora_scales", "0.7", "--output", output)
        assert run("merge", case.lora, *words) == 0
    stock = tinymodels.of(case.family).stock(folder)
    expected = original(getattr(stock, case.names.denoiser), case.names)
    before, after = load_file(case.file), load_file(file)
    assert after.keys() == before.keys() == expected.keys()
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(after[name], before[name])
    places = {case.names.layers.of_layer(layer).name for layer in case.weights[case.names.denoiser]}
    assert changed == len(places) > 5


def test_extracted_from_such_files(case, tmp_path: Path) -> None:
    merged, out = tmp_path / "merged.safetensors", tmp_path / "lora.safetensors"
    assert run("merge", case.lora, "--pretrained_model_name_or_path", case.file, "--output", merged) == 0
    assert run("extract", merged, "--pretrained_model_name_or_path", case.file, "--rank", 3, "--output", out) == 0
    found = read_given(out, None).weights[case.names.denoiser]
    expected = case.weights[case.names.denoiser]
    assert found.keys() == expected.keys()
    for layer, adapter in expected.items():
        delta = adapter.delta()
        assert (found[layer].delta() - delta).norm() < 1e-5 * delta.norm(), layer


def test_text_encoders_are_not_in_it(case, tmp_path: Path, capsys) -> None:
    weights = {**case.weights, "text_encoder": case.weights[case.names.denoiser]}
    lora = adapters.save(tmp_path / "lora.safetensors", weights, case.names)
    out = tmp_path / "merged.safetensors"
    assert run("merge", lora, "--pretrained_model_name_or_path", case.file, "--output", out) == 2
    assert "is also for the text_encoder, and" in capsys.readouterr().err


def test_it_is_no_folder(case, tmp_path: Path, capsys) -> None:
    out = tmp_path / "merged"
    assert run("merge", case.lora, "--pretrained_model_name_or_path", case.file, "--output", out) == 2
    error = capsys.readouterr().err
    assert "denoiser.safetensors" in error and "Traceback" not in error
