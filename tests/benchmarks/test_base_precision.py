"""What the benchmark of quantised bases computes from its runs; the runs themselves are not made here."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from tests.benchmarks.test_benchmarks import load


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("base_precision")


def run(before: float, after: float, in_float32: float) -> dict:
    return {"losses": {0: before, 100: after + 0.1, 200: after}, "loss_in_float32": in_float32, "seconds": 1.0}


def test_costs_are_parts_of_the_float32_gain(bench: ModuleType) -> None:
    runs = {"float32": {0: run(1.0, 0.5, 0.5), 1: run(1.0, 0.7, 0.7)}, "int8": {0: run(1.1, 0.6, 0.54)}}
    found = bench.summary({**runs, "int8": {**runs["int8"], 1: run(1.1, 0.8, 0.74)}})
    assert found["float32"]["cost_used"] == 0 and found["float32"]["cost_before"] == 0
    int8 = found["int8"]
    assert int8["cost_before"] == pytest.approx(0.1)
    assert int8["cost_trained"] == pytest.approx(0.1 / 0.4)
    assert int8["cost_used"] == int8["cost_used_least"] == int8["cost_used_most"] == pytest.approx(0.04 / 0.4)
    assert int8["loss_in_float32"] == pytest.approx(0.64)
    result = {"models": {"embedded": {"summary": found, "weight_errors": {"int8": 0.0064}}}}
    assert "| embedded, int8 | 0.64 % | 1.1000, 0.7000 | 0.6400 | +10.0 % |" in bench.table(result)


def test_fewer_bits_are_further_off(bench: ModuleType) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(64, 64), "b": 5 * torch.randn(32, 128)}
    bf16, int8, fp8 = (bench.weight_error(word, weights) for word in ("bf16", "int8", "fp8"))
    assert 0 < bf16 < int8 < fp8 < 0.03


def test_the_curves_of_the_committed_result_can_be_drawn(bench: ModuleType, tmp_path: Path) -> None:
    found = json.loads((bench._machine.RESULTS / "base_precision.json").read_text(encoding="utf-8"))
    bench.draw(found, tmp_path / "curves.webp")
    with Image.open(tmp_path / "curves.webp") as picture:
        assert picture.size == (990, 374) and len(picture.convert("RGB").getcolors(2**20) or ()) > 50
