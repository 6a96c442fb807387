"""Complete runs by the public path, in every precision with every kind of optimizer of ours."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from dreamlora.training.state import STATE_FILE
from tests.gpu.conftest import RATES, STEPS, Trained

pytestmark = pytest.mark.gpu

PRECISIONS = ("no", "bf16", "fp16")
SAME_LOSS = {"no": 1e-6, "bf16": 0.02, "fp16": 0.005}
"""How far the first loss may lie from that of float32, relative to it."""

in_every_precision = pytest.mark.parametrize("precision", PRECISIONS)
with_every_optimizer = pytest.mark.parametrize("optimizer", RATES)
Runs = Callable[[str, str], Trained]


@with_every_optimizer
@in_every_precision
def test_the_loss_falls(trained: Runs, precision: str, optimizer: str) -> None:
    run = trained(precision, optimizer)
    losses = run.values("eval/loss")
    assert list(losses) == [0, STEPS] and losses[STEPS] < losses[0]
    steps = run.values("train/loss")
    assert list(steps) == list(range(1, STEPS + 1)) and torch.tensor(list(steps.values())).isfinite().all()
    same = pytest.approx(trained("no", "adamw").values("eval/loss")[0], rel=SAME_LOSS[precision])
    assert losses[0] == same, "the base model's loss, on the same items"


@with_every_optimizer
@in_every_precision
def test_the_lora_has_moved_and_is_float32_as_is_all_that_trains_it(
    trained: Runs, precision: str, optimizer: str
) -> None:
    folder = trained(precision, optimizer).folder
    weights = load_file(folder.lora_file)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name), "each B started at zero"
    state = torch.load(folder.checkpoint_dir(STEPS) / STATE_FILE, map_location="cpu", weights_only=True)
    moments = [value for of in state["optimizer"]["state"].values() for value in of.values()]
    floating = [value for value in moments if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert len(floating) >= len(weights)
    assert all(torch.finfo(value.dtype).bits >= 32 and value.isfinite().all() for value in floating)
    assert (state["scaler"] is not None) == (precision == "fp16")


@with_every_optimizer
@in_every_precision
def test_nothing_fell_back_to_something_else(trained: Runs, precision: str, optimizer: str) -> None:
    run = trained(precision, optimizer)
    assert run.unfused == 0, "forward passes of a LoRA layer by PEFT's own"
    counts = {row["name"] for row in run.folder.metrics() if row["name"].startswith("optimizer/")}
    assert counts <= {"optimizer/clipped"}


def test_sixteen_bits_take_less_memory_and_the_summary_says_how_much(trained: Runs, device: torch.device) -> None:
    summaries = {
        precision: json.loads(trained(precision, "adamw").folder.summary_file.read_text(encoding="utf-8"))
        for precision in (PRECISIONS if device.type == "cuda" else PRECISIONS[:2])
    }
    peaks = {precision: summary["peak_memory_gib"] for precision, summary in summaries.items()}
    if device.type == "cpu":
        assert set(peaks.values()) == {None}
        return
    assert all(summary["device"] == torch.cuda.get_device_name() for summary in summaries.values())
    assert peaks["no"] < torch.cuda.get_device_properties(0).total_memory / 2**30
    assert peaks["no"] > 3.2, "the weights alone"
    assert max(peaks["bf16"], peaks["fp16"]) < 0.75 * peaks["no"]
