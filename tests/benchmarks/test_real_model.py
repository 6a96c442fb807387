"""``benchmarks/real_model.py`` on small models: what it compares is alike, and it sees what is not."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamlora import registry
from dreamlora.config import Model
from dreamlora.models.loading import family_of, resolve_source
from dreamlora.sampling.sampler import SamplePlan
from tests import tinymodels
from tests.benchmarks.test_benchmarks import load


@pytest.fixture(scope="module")
def real() -> ModuleType:
    return load("real_model")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "private" / "photos"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (24, 24), (number * 40, 90, 9)).save(folder / f"{number}.png")
    return folder


def subject(real: ModuleType, folder: Path, side: int) -> Any:
    source = resolve_source(Model(pretrained_model_name_or_path=str(folder)))
    family = family_of(source)
    plan = SamplePlan(("a cat",), 2, family.sample_defaults(source).guidance_scale, 1, 7, width=side, height=side)
    return real.Subject(family, source, plan, torch.float32, torch.device("cpu"), False)


@pytest.mark.parametrize("family", registry.names("families"))
def test_every_family_is_compared_with_the_stock_pipeline(real, family: str, tmp_path: Path) -> None:
    tiny = tinymodels.of(family)
    check = real.Check(torch.device("cpu"), {})
    real.check_conditioning(subject(real, tiny.save(tmp_path / "model"), tiny.side), check)
    assert real.problems(check.findings) == []
    by_embeddings = check.findings["stock pipeline, from embeddings"]
    assert by_embeddings["image"]["psnr_db"] > 60 or by_embeddings["mended"]
    for stage in ("stock pipeline, from embeddings", "a training's call of the denoiser"):
        for name, figure in check.findings[stage]["arguments"].items():
            # where the stock pipeline pads, and the family does not, the image tells
            assert "hidden" not in name or name == "hidden_states" or isinstance(figure, str) or figure == 0.0, name


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_all_of_it(real, family: str, photos: Path, tmp_path: Path, monkeypatch) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model = tinymodels.of(family).save(tmp_path / "private" / "model")
    words = ["--model", str(model), "--images", str(photos), "--steps", "2", "--inference_steps", "1"]
    monkeypatch.setattr("sys.argv", ["real_model.py", *words])
    with pytest.raises(SystemExit) as ended:
        real.main([*words, "--resolution", "16", "--output", str(tmp_path / "result.json")])
    assert ended.value.code == 0
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert "private" not in text and str(tmp_path) not in text, "folders of this machine are nobody's business"
    result = json.loads(text)
    assert result["problems"] == [] and result["versions"]["torch"]
    assert result["findings"]["training, all of it"]["parity"]["call"]["error"] < 1e-3
    assert result["findings"]["stock pipeline, with the LoRA loaded"]["image"]["psnr_db"] > 60
    stages = {"training: encoding prompts", "training: training", "training: parity check"}
    assert stages <= result["stages"].keys()
    assert all(stage["seconds"] >= 0 and stage["peak_gib"] > 0 for stage in result["stages"].values())


def test_a_failure_is_written_down_and_the_rest_goes_on(real, photos: Path, tmp_path: Path, monkeypatch) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    model = tinymodels.of("sd").save(tmp_path / "private" / "model")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"] += float("nan")
    save_file(weights, file, {"format": "pt"})
    words = ["--model", str(model), "--images", str(photos), "--steps", "2", "--inference_steps", "1"]
    monkeypatch.setattr("sys.argv", ["real_model.py", *words])
    with pytest.raises(SystemExit) as ended:
        real.main([*words, "--resolution", "16", "--output", str(tmp_path / "result.json")])
    assert ended.value.code == 1
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert "not finite" in " ".join(json.loads(text)["problems"]) and "private" not in text


def test_other_images_and_arguments_are_seen(real) -> None:
    ones = {"a": torch.ones(2, 3), "b": torch.ones(1, 3), "c": torch.ones(1, 4), "d": torch.ones(())}
    others = {"a": torch.full((1, 3), 1.5), "b": torch.ones(1, 3), "c": torch.ones(1, 5)}
    assert real.differences(ones, others) == {
        **{"a": 0.5, "b": 0.0},
        **{"c": "0.0 where both are: [1, 4] and [1, 5]", "d": "given by the first alone"},
    }
    assert real.problems({"x": {"image": {"psnr_db": 12.0}}}) == ["x: its image is another one (PSNR 12.0 dB)"]
    lost = {"call": {"error": 1.0, "rounding": 0.01}}
    assert "does not do what it did in training" in real.problems({"training": {"parity": lost}})[0]
