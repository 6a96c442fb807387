"""``--save_format``: the result and the best checkpoint in other formats too, or a refusal before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamlora.cli.parse import parse_run
from dreamlora.commands.doctor.diagnosis import diagnose
from dreamlora.errors import UserError
from dreamlora.lora.embeddings import files_beside
from dreamlora.lora.files import read_weights
from dreamlora.lora.names import LayerNames, ModelNames, model_names, same
from dreamlora.lora.weights import AdapterWeights, LayerWeights
from dreamlora.models import parts
from dreamlora.run import formats, preflight
from tests.training.conftest import cache, flags, photos, train

__all__ = ["cache", "flags", "photos", "train"]


def test_the_result_and_the_best_are_in_all_formats(train, sd_folder: Path) -> None:
    more = ["--train_text_encoder", "--new_tokens", "sks=d"]
    run = train("--save_format", "kohya", "comfyui", "peft", "diffusers", *more)
    model = model_names("sd", json.loads((sd_folder / "unet" / "config.json").read_text(encoding="utf-8")))
    for place in (run.path, run.best):
        names = {path.name for path in place.iterdir() if path.name.startswith("run_")}
        assert names == {"run_kohya.safetensors", "run_comfyui.safetensors", "run_peft"}
        own = read_weights(place / "pytorch_lora_weights.safetensors", model)
        assert own.keys() == {"unet", "text_encoder"}
        for file in ("run_kohya.safetensors", "run_peft/adapter_model.safetensors"):
            assert files_beside(place / file) == [place / "embeddings" / "sks.safetensors"]
        for name in names:
            found = read_weights(place / name, model)
            for component, adapters in own.items():
                for layer, adapter in adapters.items():
                    torch.testing.assert_close(found[component][layer].delta(), adapter.delta())
    run.clear()
    assert [path.name for path in run.path.iterdir() if path.name.startswith("run_")] == []


def test_doctor_says_that_no_such_program_has_the_model(flags, tiny_folder) -> None:
    more = ["--pretrained_model_name_or_path", str(tiny_folder("sana")), "--resolution", "32"]
    found = diagnose(*parse_run([*flags, *more, "--save_format", "kohya"]))
    assert any("--save_format kohya: no program of kohya's" in error for error in found["errors"]), found["errors"]
    assert diagnose(*parse_run([*flags, *more, "--save_format", "peft", "diffusers"]))["errors"] == []


@pytest.fixture
def nothing_loaded(monkeypatch) -> None:
    get = parts.Parts.get

    def scheduler_alone(self: parts.Parts, role: Any) -> Any:
        assert role == "scheduler"
        return get(self, role)

    monkeypatch.setattr(parts.Parts, "get", scheduler_alone)


@pytest.mark.usefixtures("nothing_loaded")
def test_a_layer_without_a_name_stops_the_run_before_anything_is_loaded(train, monkeypatch) -> None:
    model = ModelNames("unet", LayerNames(same("conv_in")))
    monkeypatch.setattr(formats, "names_of", lambda family, config: model)
    with pytest.raises(UserError, match=r"--save_format comfyui: .*to_.* has no name there"):
        train("--save_format", "comfyui")


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize("adapter", ["loha", "lokr"])
def test_a_kind_that_a_format_cannot_hold_stops_the_run_before_anything_is_loaded(adapter, train, tmp_path) -> None:
    with pytest.raises(UserError, match=f"--save_format diffusers: .*LoRAs and DoRAs alone, .* has a {adapter}"):
        train("--adapter", adapter, "--train_text_encoder", "--save_format", "kohya", "comfyui", "peft", "diffusers")
    assert not (tmp_path / "run").exists()


def test_what_a_format_cannot_hold_stops_the_run_before_it_trains(train, monkeypatch) -> None:
    """A kind of adapter that only the LoRA itself shows."""

    def kinds(modules: Any) -> AdapterWeights:
        factors = {"lokr_w1": torch.ones(1, 1), "lokr_w2": torch.ones(4, 4)}
        return {"unet": {"conv_in": LayerWeights("lokr", factors, 1.0)}}

    monkeypatch.setattr(formats, "weights_of", kinds)
    with pytest.raises(UserError, match=r"--save_format diffusers: .*LoRAs and DoRAs alone"):
        train("--save_format", "diffusers")


def test_a_family_that_is_named_is_checked_without_the_model(flags) -> None:
    config, _ = parse_run([*flags, "--family", "sana", "--save_format", "comfyui"])
    with pytest.raises(UserError, match="--save_format comfyui: ComfyUI does not have this model"):
        preflight.check(config)


@pytest.mark.parametrize("given", ["nonsense", "kohya,comfyui"])
def test_an_unknown_format_is_named(flags, given: str) -> None:
    with pytest.raises(UserError, match="--save_format"):
        parse_run([*flags, "--save_format", given])
