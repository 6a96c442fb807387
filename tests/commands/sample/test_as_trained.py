"""`dreamlora sample` of a finished run draws the images that training drew at its last step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamlora.commands.sample import draw
from dreamlora.commands.sample.command import main
from dreamlora.jsonl import read_jsonl
from dreamlora.memory import StageMemory
from dreamlora.runfolder import RunFolder
from dreamlora.schemas import OBJECT
from tests.fakemps import MPS, Bus
from tests.training.conftest import cache, flags_of, photos, train_with

__all__ = ["cache", "photos"]  # fixtures
QUICK = ["--max_train_steps", "3", "--sample_steps", "3", "--eval_steps", "0", "--checkpointing_steps", "0"]
SD = ["--class_prompt", "a dog", "--sample_seed", "7", "--num_images_per_prompt", "2", "--negative_prompt", "blue"]
CASES: dict[str, tuple[str, list[str]]] = {
    "sd": ("sd", SD),
    "sd predicts v": ("sd", [*SD, "--prediction_type", "v_prediction"]),
    "sd with short prompts": ("sd", [*SD, "--tokenizer_max_length", "5"]),
    "sd with a text encoder": ("sd", [*SD, "--train_text_encoder"]),
    "sd in bf16": ("sd", [*SD, "--mixed_precision", "bf16"]),
    "sd in bf16 with a text encoder": ("sd", [*SD, "--mixed_precision", "bf16", "--train_text_encoder"]),
    "sd in bf16 with another start": ("sd", [*SD, "--mixed_precision", "bf16", "--init", "olora"]),
    "sd with new tokens": ("sd", [*SD, "--new_tokens", "sks:2=d,o"]),
    "sd in bf16 with new tokens": ("sd", [*SD, "--mixed_precision", "bf16", "--new_tokens", "sks:2", "--seed", "3"]),
    "flux with new tokens and a text encoder": ("flux", ["--new_tokens", "sks=d", "--train_text_encoder"]),
    "flux": ("flux", ["--guidance_scale", "2", "--max_sequence_length", "20"]),
    "flux with weights in int8": ("flux", ["--base_precision", "int8", "--text_encoder_precision", "int8"]),
    "sd in bf16 with weights in fp8": ("sd", [*SD, "--mixed_precision", "bf16", "--base_precision", "fp8"]),
    "flux in bf16": ("flux", ["--max_sequence_length", "20", "--mixed_precision", "bf16"]),
}
ROUNDING = 16
"""Of 255: a LoRA that starts away from zero is saved as another sum of products, which bf16 rounds otherwise."""


def images(rows: list[Mapping[str, Any]], folder: Path) -> dict[tuple[str, int], np.ndarray]:
    return {(row["prompt"], row["seed"]): np.asarray(Image.open(folder / row["file"])).astype(int) for row in rows}


@pytest.mark.parametrize(("family", "more"), CASES.values(), ids=list(CASES))
def test_it_draws_the_very_images_that_training_drew(
    family: str, more: list[str], photos: Path, cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{family}_folder")
    flags = [*flags_of(photos, cache, model, tmp_path / "run"), *QUICK, "--learning_rate", "0.3", *more]
    run: RunFolder = train_with(flags)
    main([str(run.path), "--trust_runs", "--output_dir", str(tmp_path / "out")])
    drawn = list(read_jsonl(tmp_path / "out" / "samples.jsonl", OBJECT))
    trained = run.sample_rows()
    for step, lora in ((0, False), (3, True)):
        ours = images([row for row in drawn if bool(row["lora"]) == lora], tmp_path / "out")
        theirs = images([row for row in trained if row["step"] == step], run.samples)
        assert ours.keys() == theirs.keys()
        apart = max(int(abs(image - theirs[key]).max()) for key, image in ours.items())
        assert apart <= (ROUNDING if lora and "--init" in more else 0), f"step {step}"


@pytest.mark.parametrize(
    ("model", "more"), [("sdxl", ["--train_text_encoder"]), ("flux", ["--new_tokens", "sks"]), ("sd3", [])]
)
def test_on_a_device_the_text_encoders_have_gone_when_the_denoiser_comes(
    model: str,
    more: list[str],
    photos: Path,
    cache: Path,
    tmp_path: Path,
    tiny_folder: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the base, for a LoRA in both, and for one of the denoiser alone."""
    flags = [*flags_of(photos, cache, tiny_folder(model), tmp_path / "run"), *QUICK, *more]
    run: RunFolder = train_with(flags)
    asked = [str(run.path), "--trust_runs", "--lora_scales", "1", "0.5"]
    main([*asked, "--output_dir", str(tmp_path / "cpu")])
    bus: Bus = request.getfixturevalue("bus")
    made = draw.prepared
    there = StageMemory(MPS, meters=())
    monkeypatch.setattr(draw, "prepared", lambda config, rows, run, _, options: made(config, rows, run, there, options))
    main([*asked, "--output_dir", str(tmp_path / "device")])
    cpu, device = (
        images(list(read_jsonl(tmp_path / name / "samples.jsonl", OBJECT)), tmp_path / name)
        for name in ("cpu", "device")
    )
    assert cpu.keys() == device.keys() and max(int(abs(cpu[key] - device[key]).max()) for key in cpu) <= 1
    with_text = [names for names in bus.seen if any("CLIP" in name or "T5" in name for name in names)]
    assert with_text and all(len(names) == 1 for names in with_text)
    drawn = 3 if more else 1  # a LoRA of the denoiser alone is drawn with the embeddings that there are
    assert len(with_text) <= drawn * 3
