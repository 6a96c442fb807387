"""The comparison on a GPU, tried without one: command lines, what it makes of figures, and a run of its code."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dreamlora.cli.parse import parse_run
from dreamlora.config import Lora
from dreamlora.lora.inject import add_lora
from dreamlora.lora.pairs import adapted_layers
from dreamlora.registry import load as load_plugin
from tests.benchmarks.test_benchmarks import BENCHMARKS, load

ENVIRONMENT = os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return load("gpu_speed")


@pytest.fixture(scope="module")
def plan(speed: ModuleType) -> Any:
    return speed.plan


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / words[0]), *words[1:]]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def measured(rate: float, peak: float | None = 4.0, wall: float = 10.0) -> dict[str, Any]:
    memory = {"allocated_gib": peak, "reserved_gib": peak, "host_gib": 8.0}
    return {"steps_per_s": rate, "median_ms": 1e3 / rate, **memory, "wall_s": wall}


def test_all_of_it_works_on_a_cpu(speed: ModuleType, tmp_path: Path) -> None:
    """A transformer by this program and bare."""
    common = ["gpu_speed.py", "--device", "cpu", "--tiny", "--folder", str(tmp_path / "f"), "--results", str(tmp_path)]
    done = run(*common, "--cases", "klein", "--programs", "ours", "bare")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu_speed_cpu.json").read_text(encoding="utf-8"))
    assert set(result["cases"]["klein"]) == {"ours", "bare"}
    assert set(result["ratios"]["klein"]) == {"steps / bare"}
    assert [target["what"] for target in result["targets"]] == ["steps / bare"]
    assert speed.table(result) in done.stdout
    assert str(tmp_path) not in json.dumps(result)


def test_a_program_is_watched_to_its_end(tmp_path: Path) -> None:
    """Its optimizer's steps, in its own time, also when it leaves by an exit; flags and name are its own."""
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, time, torch\n"
        "assert sys.argv == [__file__, '--steps', '3'] and __name__ == '__main__'\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = torch.optim.AdamW([weight])\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    weight.grad = torch.ones(2); time.sleep(0.05); optimizer.step()\n"
        "sys.exit(0)\n",
        encoding="utf-8",
    )
    done = run("_watched.py", str(tmp_path / "seen.json"), str(script), "--steps", "3")
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    first, second, third = seen["ends_ms"]
    assert first == 0 and second >= 50 and third - second >= 50
    assert 0.05 < seen["host_gib"] < 10


def test_the_rate_leaves_the_warm_up_out(speed: ModuleType, plan: Any) -> None:
    case = plan.Case("sdxl", 64, 1, 4, warm_up=2, timed=3)
    watched = {"ends_ms": [0.0, 900.0, 1000.0, 1300.0, 1400.0], "allocated_gib": 1.23456}
    found = speed.figures(watched | {"reserved_gib": None, "host_gib": 2.0}, case)
    assert found["steps_per_s"] == pytest.approx(3 / 0.5) and found["median_ms"] == 100
    assert found["allocated_gib"] == 1.235 and found["reserved_gib"] is None


def test_a_program_that_made_other_steps_is_no_measurement(speed: ModuleType, plan: Any) -> None:
    watched = {"ends_ms": [0.0, 1.0], "allocated_gib": None, "reserved_gib": None, "host_gib": 2.0}
    with pytest.raises(ValueError, match="5 steps were asked for, and 2 made"):
        speed.figures(watched, plan.Case("sdxl", 64, 1, 4, warm_up=2, timed=3))


def test_ratios_and_targets(plan: Any) -> None:
    found = {
        "sdxl1": {
            "ours": measured(2.6, 7.2, 30.0),
            "compile": measured(3.9),
            "diffusers": measured(2.0, 9.0, 60.0),
            "bare": measured(2.5),
        },
        "flux-nf4": {"ours": measured(0.9, 11.5), "bare": measured(1.0)},
        "flux-nf4-offload": {"ours": measured(0.8, 7.0), "capped": measured(0.4, 7.0)},
        "flux": {"ours": {"failed": "out of memory", "wall_s": 9.0}, "bare": measured(1.0)},
    }
    ratios = plan.ratios(found)
    assert ratios["sdxl1"] == {
        "steps / bare": pytest.approx(1.04),
        "steps / diffusers": pytest.approx(1.3),
        "peak / diffusers": pytest.approx(0.8),
        "wall time / diffusers": pytest.approx(0.5),
        "steps of compile / ours": pytest.approx(1.5),
    }
    assert ratios["flux-nf4-offload"] == {"steps / bare": 0.8, "steps of capped / ours": 0.5}, "the limit is flux-nf4's"
    assert "flux" not in ratios
    targets = {(target.case, target.what): target.met for target in plan.targets(found)}
    assert targets == {
        ("sdxl1", "steps / bare"): True,
        ("sdxl1", "steps / diffusers"): True,
        ("sdxl1", "peak / diffusers"): True,
        ("sdxl1", "peak GiB"): True,
        ("flux-nf4", "steps / bare"): False,
        ("flux-nf4", "peak GiB"): False,
        ("flux-nf4-offload", "steps / bare"): False,
        ("flux-nf4-offload", "peak GiB"): True,
    }


def test_without_a_gpu_no_card_is_judged(plan: Any) -> None:
    found = {"sdxl1": {"ours": measured(2.0, None), "diffusers": measured(1.0, None)}}
    assert plan.ratios(found)["sdxl1"]["peak / diffusers"] == 1, "of the memory of the processes"
    assert {target.what for target in plan.targets(found)} == {"steps / diffusers", "peak / diffusers"}


def test_the_estimate_is_judged_by_what_was_measured(plan: Any) -> None:
    found = {
        "klein": {"ours": measured(2.0, 10.0), "estimate": {"allocated_gib": 11.5}},
        "sd15": {"ours": measured(2.0, 10.0), "estimate": {"allocated_gib": 8.4}},
        "sdxl4": {"ours": {"failed": "out of memory", "wall_s": 9.0}, "estimate": {"allocated_gib": 8.4}},
    }
    targets = {target.case: (target.found, target.met) for target in plan.targets(found)}
    assert targets == {"klein": (1.15, True), "sd15": (0.84, False)}


def test_hollow_models_have_the_real_size_and_take_no_room(tmp_path: Path) -> None:
    done = run("_random_pipelines.py", str(tmp_path), "flux", "--hollow")
    assert done.returncode == 0, done.stderr[-2000:]
    transformer = tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(transformer, "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert sum(sizes) / 1e6 == pytest.approx(11901.4, abs=0.1)
    assert sum(512 * path.stat().st_blocks for path in tmp_path.rglob("*")) < 10 * 2**20
    assert (tmp_path / "flux" / "tokenizer_2" / "tokenizer_config.json").exists()


def test_measurements_are_put_beside_earlier_ones(speed: ModuleType, tmp_path: Path) -> None:
    speed.Result("gpu_speed_x", tmp_path, {"card": {"name": "A"}}).add("klein", "ours", measured(2.0))
    again = speed.Result("gpu_speed_x", tmp_path, {"card": {"name": "A"}})
    again.add("sdxl1", "ours", measured(1.0))
    again.add("klein", "bare", measured(4.0))
    file = again.add("klein", "ours", measured(3.0))
    result = json.loads(file.read_text(encoding="utf-8"))
    assert list(result["cases"]) == ["sdxl1", "klein"], "in the order of the cases"
    assert result["ratios"]["klein"] == {"steps / bare": 0.75}
    assert result["cases"]["klein"]["ours"]["torch"] == torch.__version__


def test_the_table_has_a_line_for_each_case(speed: ModuleType, plan: Any) -> None:
    found = {
        "sdxl1": {
            "ours": measured(2.6),
            "compile": measured(3.9),
            "bare": measured(2.5),
            "estimate": {"allocated_gib": 4.4},
        },
        "klein": {"ours": {"failed": "out of memory", "wall_s": 3.0}},
    }
    result = {
        "card": {"name": "A"},
        "machine": {"versions": {"torch": "9"}},
        "cases": found,
        "ratios": plan.ratios(found),
    }
    lines = speed.table(result).splitlines()
    assert lines[0] == "**A** (torch 9):"
    assert lines[4] == "| sdxl1 | 2.60 | 1.04 | – | 4.00 | 4.40 | – | 10 | – |"
    assert lines[5].startswith("| sdxl1, compile | 3.90 |")
    assert lines[6].startswith("| klein | failed |")
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_programs_get_the_same_settings(plan: Any, tmp_path: Path) -> None:
    """diffusers' script what ours has, but for flags of its own; the bare step its load and its form."""
    places = plan.Places(tmp_path / "models", tmp_path / "images", tmp_path / "scratch", tmp_path / "examples")
    for name, case in plan.CASES.items():
        ours, theirs, bare = (plan.command(case, program, places, "cuda") for program in ("ours", "diffusers", "bare"))
        shared = ours[ours.index("--pretrained_model_name_or_path") : ours.index("--sample_steps")]
        assert theirs[theirs.index("--pretrained_model_name_or_path") :][: len(shared)] == shared
        for word in ("--rank", "--resolution", "--mixed_precision", "--base_precision", "--gradient_checkpointing"):
            assert (word in ours) == (word in bare), name
        assert bare[bare.index("--batch") + 1] == ours[ours.index("--train_batch_size") + 1]


def test_this_program_knows_the_flags(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    places = plan.Places(tmp_path, tmp_path / "images", tmp_path / "scratch", None)
    for case in plan.CASES.values():
        for program in plan.programs_of(case, ["ours", "compile"], None, "cuda"):
            config, _ = parse_run(plan.command(case, program, places, "cuda")[3:])
            model, train = config.model, config.train
            assert (model.base_precision, model.offload_blocks) == (case.base_precision, case.offload)
            assert model.gradient_checkpointing == case.checkpointing and model.compile == (program == "compile")
            assert (train.max_train_steps, train.train_batch_size) == (case.steps, case.batch)


def test_what_has_no_meaning_is_not_run(plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(plan.PROGRAMS)

    def of(name: str, examples: Path | None = tmp_path, device: str = "cuda") -> list[str]:
        found: list[str] = plan.programs_of(plan.CASES[name], every, examples, device)
        return found

    monkeypatch.setattr(plan, "has_package", lambda name: True)
    assert of("klein") == ["ours", "compile", "diffusers", "diffusers-plain", "bare"]
    assert of("sdxl1") == ["ours", "compile", "capped", "diffusers", "bare"], "its script has no faster way"
    assert of("klein", None) == ["ours", "compile", "bare"]
    assert of("flux-nf4-offload") == ["ours", "capped"], "what moves is not compiled"
    assert "bare" in of("flux-nf4") and "bare" not in of("flux-nf4", device="cpu")
    monkeypatch.setattr(plan, "has_package", lambda name: name != "bitsandbytes")
    assert of("flux-nf4") == []


@pytest.mark.parametrize(
    ("model", "family", "millions", "layers"),
    [
        ("sd15", "sd", 859.5, 128),
        ("sdxl", "sdxl", 2567.5, 560),
        ("klein", "flux2", 3875.5, 60),
        ("flux", "flux", 11901.4, 342),
    ],
)
def test_models_are_of_real_size_and_both_sides_adapt_the_same_layers(
    model: str, family: str, millions: float, layers: int
) -> None:
    pipelines, bare = load("_random_pipelines"), load("_bare_step")

    class Denoiser(Exception):
        pass

    class Maker(pipelines.Maker):  # type: ignore[misc,name-defined]
        vae = clip = t5 = qwen3 = lambda self, *_, **__: None

        def denoiser(self, kind: Any, config: dict[str, Any], tiny: dict[str, Any]) -> Any:
            raise Denoiser(super().denoiser(kind, config, tiny))

    def denoiser() -> Any:
        with pytest.raises(Denoiser) as caught:
            pipelines.PIPELINES[model](Maker("meta", False))
        return caught.value.args[0]

    theirs, ours = denoiser(), denoiser()
    assert sum(p.numel() for p in theirs.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    bare.add_lora(theirs, 4)
    add_lora(ours, Lora(rank=4), load_plugin("families", family).LORA_LAYERS)
    names = {name.split(".lora_A")[0] for name, _ in theirs.named_parameters() if ".lora_A." in name}
    assert len(names) == layers and names == {adapted.name for adapted in adapted_layers(ours)}
