"""The time of a step whose work differs from step to step, and how exact a step is."""

from __future__ import annotations

import time
from types import ModuleType

import pytest
import torch

from dreamlora.optimizers import LoRAMuon, lora_param_groups
from dreamlora.optimizers._rank_space import RankSpace
from tests.benchmarks.test_benchmarks import load
from tests.benchmarks.test_documents import results


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    return load("optimizer_step")


def test_the_time_of_a_step_is_the_mean_over_a_period_of_medians(steps: ModuleType) -> None:
    fused = [1.0, 1.0, 9.0, 1.0] + [1.0] * 8
    other = [8.0, 2.0, 2.0, 4.0, 8.0, 2.0, 2.0, 4.0, 80.0, 2.0, 2.0, 4.0]
    found = steps.ratios({steps.FUSED: fused, "lora_muon": other})
    assert found["lora_muon"] == {"median_ms": 4.0, "fastest_ms": 2.0, "times_fused_adamw": 4.0}
    assert steps.typical([3.0]) == 3.0


@pytest.mark.parametrize("rounds", [5, 8])
def test_whole_periods_are_measured_as_after_the_first_steps(
    steps: ModuleType, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    made = []
    original = RankSpace.coordinates
    monkeypatch.setattr(RankSpace, "coordinates", lambda self: made.append(None) or original(self))
    counts: list[int] = []
    monkeypatch.setattr(
        steps,
        "OPTIMIZERS",
        {
            steps.FUSED: lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
            "lora_muon": lambda m: LoRAMuon(lora_param_groups(m), lr=1e-4),
        },
    )
    original_step = LoRAMuon.step

    def step(self: LoRAMuon) -> None:
        before = len(made)
        original_step(self)
        counts.append(int(len(made) > before))

    monkeypatch.setattr(LoRAMuon, "step", step)
    steps.measure("tiny/2", "cpu", rounds, time.perf_counter)
    assert counts == [1, 1, *[1, 0, 0, 0] * 2]


def test_targets_are_judged_where_their_case_was_measured(steps: ModuleType) -> None:
    cases = {"sd15/16": {"optimizers": {}}, "tiny/4": {"optimizers": {}}}
    times = {steps.FUSED: 1.0, steps.PEFT: 12.0, "scaled_adamw": 3.5, "lora_muon": 4.5}
    cases["sd15/16"]["optimizers"] = {name: {"median_ms": value} for name, value in times.items()}
    found = {(row["optimizer"], row["of"]): row["passed"] for row in steps.judged(cases, "cpu")}
    assert found == {
        ("scaled_adamw", steps.FUSED): False,
        ("scaled_adamw", steps.PEFT): True,
        ("lora_muon", steps.FUSED): True,
    }
    assert steps.judged({}, "cuda") == []


# ---------------------------------------------------------------- accuracy


HARD = {"condition of B 1e7", "B of rank 4 and 1e-5"}
"""What float32 factors do not hold: their Gram matrix's weak directions are the rounding of the factors."""


def test_a_step_is_exact_but_for_the_floor_and_the_same_in_every_factorisation() -> None:
    cases = results("step_accuracy")["cases"]
    assert len(cases) == 7
    for name, ways in cases.items():
        taken, single = ways["taken"], ways["eigenvalues, float32"]
        assert taken["error"] < (5e-2 if name in HARD else 5e-3), name
        assert taken["gauge"] < 1e-3, name
        assert taken["gauge"] < single["gauge"], name
        assert taken["largest"] < 1.01, name


def test_the_accuracy_is_measured_as_it_is_committed() -> None:
    benchmark = load("step_accuracy")
    generator = torch.Generator().manual_seed(0)
    benchmark.RANK, benchmark.WIDTH, benchmark.OUTPUTS = 8, 40, 48
    A, B, G = benchmark.situations(generator)["condition of B 1e2"]
    exact = benchmark.step_of(benchmark.WAYS["eigenvalues, float64"], A, B, G, torch.float64)
    here = benchmark.step_of(benchmark.WAYS["taken"], A, B, G, torch.float32)
    precise = benchmark.step_of(benchmark.WAYS["taken"], A, B, G, torch.float64)
    assert (here - exact).norm() < 5e-3 * exact.norm()
    assert (precise - exact).norm() < 1e-8 * exact.norm()
