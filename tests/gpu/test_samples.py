"""Samples drawn while a model trains: what a stock pipeline draws, and cheaper than training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlora.callbacks.sample import SampleCallback
from dreamlora.report import words
from dreamlora.report.facts import RunFacts
from dreamlora.training import loop
from tests.gpu.conftest import STEPS, Train, peak_mib

pytestmark = pytest.mark.gpu

LEAST_PSNR = {"no": 45.0, "bf16": 25.0, "fp16": 30.0}
"""dB between the training's last sample and a fresh stock pipeline's; rounding adds up over the denoising steps."""
SAMPLING_OF_TRAINING = 1.0
"""Memory of drawing, beyond the model's own, of what a training step takes: four guided images are eight predictions
without gradients, a step is two with them."""


@pytest.mark.parametrize("precision", LEAST_PSNR)
def test_samples_are_what_a_stock_pipeline_draws(
    train: Train, device: torch.device, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: dict[str, list[float]] = {"sampling": [], "training": []}
    measured(monkeypatch, device, SampleCallback, "_draw", peaks["sampling"])
    measured(monkeypatch, device, loop, "optimizer_step", peaks["training"])
    images = ("--sample_steps", str(STEPS), "--num_images_per_prompt", "4")
    folder = train(precision, "scaled_adamw", *images).folder

    rows = folder.sample_rows()
    assert {row["step"] for row in rows} == {0, STEPS} and len(rows) >= 8
    assert not [row["problem"] for row in rows if "problem" in row]
    for row in rows:
        with Image.open(folder.samples / row["file"]) as image:
            assert np.asarray(image).std() > 1
    assert json.loads(folder.summary_file.read_text(encoding="utf-8"))["parity"]["psnr_db"] > LEAST_PSNR[precision]
    verdict, reason = words.parity(RunFacts(folder))
    assert verdict == "good" or (verdict == "fair" and precision != "no"), reason

    assert len(peaks["sampling"]) == 2 and len(peaks["training"]) == STEPS
    if device.type == "cuda":
        assert max(peaks["sampling"]) < SAMPLING_OF_TRAINING * max(peaks["training"]), peaks


def measured(monkeypatch: pytest.MonkeyPatch, device: torch.device, owner: Any, name: str, peaks: list[float]) -> None:
    """Collects the peak memory of every call of a function, in MiB."""
    original = getattr(owner, name)

    def measuring(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        peaks.append(peak_mib(device, lambda: results.append(original(*args, **kwargs))))
        return results[0]

    monkeypatch.setattr(owner, name, measuring)
