"""The check of a GPU, tried without one: what it makes of results and of time, and a run of all its code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dreamlora.config import Lora
from dreamlora.lora.fused import FusedLinear
from dreamlora.lora.inject import add_lora
from dreamlora.lora.pairs import adapted_layers
from tests.benchmarks.test_benchmarks import BENCHMARKS, load
from tests.gpu.conftest import chosen_device


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load("gpu_check")


@pytest.fixture(scope="module")
def tier() -> ModuleType:
    return load("_gpu_tier")


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    return load("_whole_step")


def test_all_of_it_works_on_a_cpu(check: ModuleType, tmp_path: Path) -> None:
    """The tests of the tier too, with their small model."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--quick"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu_check_cpu.json").read_text(encoding="utf-8"))
    counts = result["tier"]["counts"]
    assert counts["passed"] > 25 and "failed" not in counts
    reasons = {test["message"] for test in result["tier"]["tests"] if test["outcome"] == "skipped"}
    known = ("fp16", "needs a CUDA device", "a CPU has no memory of its own")
    assert all(any(words in reason for words in known) for reason in reasons), reasons
    assert not result["left_out"] and not result["failed"]
    names = set(check.optimizer_step.OPTIMIZERS)
    assert set(result["optimizer_step"]["tiny/4"]["optimizers"]) == names
    assert set(result["whole_step"]["tiny/4"]["optimizers"]) == names | {check._whole_step.PLAIN}
    assert check.table(result) in done.stdout
    assert str(tmp_path.parent) not in json.dumps(result)


def test_without_a_gpu_the_tests_are_skipped_and_say_so(tier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {f"tests/gpu/test_{name}.py" for name in ("runs", "fused", "resume", "samples", "devices")}
    assert modules <= set(tier.files())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DREAMLORA_GPU_TESTS_DEVICE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="there is no GPU; with DREAMLORA_GPU_TESTS_DEVICE=cpu a small"):
        chosen_device()
    monkeypatch.setenv("DREAMLORA_GPU_TESTS_DEVICE", "cpu")
    assert chosen_device() == torch.device("cpu")


def test_outcomes_are_read_from_the_report(tier: ModuleType) -> None:
    report = """<testsuites><testsuite>
        <testcase classname="a.b" name="one" time="1.5"><system-out>words</system-out></testcase>
        <testcase classname="a.b" name="two" time="0.5"><failure message="assert 1 == 2">trace</failure></testcase>
        <testcase classname="a.b" name="three" time="0"><skipped message="no GPU"/></testcase>
        <testcase classname="a.b" name="four" time="0"><error message="fixture"/></testcase>
    </testsuite></testsuites>"""
    found = tier.outcomes(report)
    assert found["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert found["tests"][:2] == [
        {"name": "a.b::one", "outcome": "passed", "seconds": 1.5},
        {"name": "a.b::two", "outcome": "failed", "seconds": 0.5, "message": "assert 1 == 2"},
    ]


def test_tests_that_take_too_long_are_interrupted(tier: ModuleType) -> None:
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(7)"
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    time.sleep(0.5)
    assert not tier._wait(process, 0.1)
    assert process.returncode == 7, "it could write its report"
    quick = subprocess.Popen([sys.executable, "-S", "-c", ""])
    assert tier._wait(quick, 60)


def test_what_there_is_no_time_for_is_left_out_and_a_failure_loses_nothing(check: ModuleType) -> None:
    def failing() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    rows = [("whole_step", "a/1", dict), ("whole_step", "b/1", failing), ("optimizer_step", "a/1", dict)]
    found = check.measured(rows, time.monotonic() + 60)
    assert found["whole_step"] == {"a/1": {}} and found["optimizer_step"] == {"a/1": {}}
    assert found["failed"] == {"whole_step b/1": "RuntimeError: out of memory"} and not found["left_out"]
    late = check.measured(rows, time.monotonic() + check.ROW_S - 1)
    assert list(late["left_out"]) == ["whole_step a/1", "whole_step b/1", "optimizer_step a/1"]


def test_every_case_is_measured_whole_and_alone(check: ModuleType) -> None:
    cases = [(part, case) for part, case, _ in check.rows("cuda", check.CASES, 5)]
    wanted = {f"{model}/{rank}" for model in ("sd15", "sdxl") for rank in (4, 16, 64)}
    assert {case for part, case in cases if part == "whole_step"} == wanted
    assert {case for part, case in cases if part == "optimizer_step"} == wanted


def test_files_are_called_after_the_card(check: ModuleType) -> None:
    name = check._machine.file_name
    assert name("gpu_check", "NVIDIA H100 80GB HBM3") == "gpu_check_h100_80gb_hbm3"
    assert name("gpu_speed", "NVIDIA A100-SXM4-40GB MIG 1g.5gb") == "gpu_speed_a100_sxm4_40gb_mig_1g_5gb"


def test_the_table(check: ModuleType) -> None:
    def timed(adamw: float, other: float) -> dict[str, Any]:
        return check.optimizer_step.ratios({check.FUSED: [adamw], "lora_rite": [other]})

    result = {
        "card": {"name": "NVIDIA H100", "driver": "580.1"},
        "machine": {"versions": {"torch": "2.11.0"}},
        "tier": {"counts": {"passed": 60, "skipped": 2}, "seconds": 171.6},
        "whole_step": {
            "sd15/16": {"optimizers": timed(100.0, 110.0), "step_mib": {"fused": 8000, "peft": 9200}},
            "sd15/4": {"optimizers": timed(98.04, 102), "step_mib": {"fused": 7900, "peft": 9000}},
        },
        "optimizer_step": {},
    }
    assert check.table(result).splitlines() == [
        "**NVIDIA H100** (torch 2.11.0, driver 580.1): 60 passed, 0 failed, 2 skipped of the GPU tests, in 172 s.",
        "",
        "| Whole step, bf16 | sd15/4 | sd15/16 |",
        "| --- | --- | --- |",
        "| adamw (torch, fused) | 98.0 ms | 100.0 ms |",
        "| lora_rite | 1.04 × | 1.10 × |",
        "| memory of the step | 7,900 MiB | 8,000 MiB |",
        "| memory, PEFT's layer | 1.14 × | 1.15 × |",
    ]


@pytest.mark.parametrize(("model", "parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_the_unets_are_those_of_the_real_models(check: ModuleType, model: str, parameters: int) -> None:
    unets = load("_unets")
    unet = unets.random_unet(unets.config_of(model), "meta", torch.bfloat16)
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    add_lora(unet, Lora(rank=4), load("_whole_step").LORA_LAYERS)
    shapes = [(layer.B.shape[0], layer.A.shape[1]) for layer in adapted_layers(unet)]
    assert sorted(shapes) == sorted(check.optimizer_step.SHAPES[model])


SMALL_SDXL = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,
}


def test_a_step_gives_gradients_to_the_adapter_alone_and_layers_are_exchanged(
    steps: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDXL's inputs and checkpointing, on a small model of its kind."""
    config = {**load("_unets").SDXL, **SMALL_SDXL}
    monkeypatch.setattr(steps, "config_of", lambda _: config)
    step = steps.Step("sdxl/2", "cpu")
    adapter = {id(parameter) for parameter in step.adapter.parameters()}
    gradients = []
    for layer in (FusedLinear, steps.Linear):
        step.use(layer)
        assert {type(each.layer) for each in adapted_layers(step.unet)} == {layer}
        step.gradients()
        assert {id(parameter) for parameter in step.unet.parameters() if parameter.grad is not None} == adapter
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in step.adapter.parameters()]))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()
