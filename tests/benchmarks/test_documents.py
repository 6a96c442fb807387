"""Figures in the documents are those of the committed results, to the digits that they are told with."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dreamlora import tiny
from dreamlora.models.footprint import Stored
from tests.benchmarks.test_benchmarks import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(document: str, first_head: str) -> dict[str, list[str]]:
    """The cells of every row by its first one, of the table in a document whose first heading is this."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {first_head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {row[0]: row[1:] for row in rows}


def told(text: str) -> list[float]:
    """All numbers in a text."""
    return [float(number.replace("−", "-").replace(",", "")) for number in re.findall(r"[−-]?\d[\d,]*\.?\d*", text)]


def assert_told(text: str, *values: float) -> None:
    """The numbers in the text are these, rounded to as many digits as it has."""
    digits = [len(number.partition(".")[2]) for number in re.findall(r"\d[\d,]*\.?\d*", text)]
    assert told(text) == [pytest.approx(round(value, n)) for value, n in zip(values, digits, strict=True)], text


def test_what_an_automatic_rate_is_worth() -> None:
    found, rows = results("auto_rate"), table("docs/training.md", "proposed for")
    assert len(rows) == len(found["rows"])
    for row in found["rows"]:
        cells = rows[f"{row['method']}, {row['subject']}, rank {row['rank']}, {row['steps']} steps"]
        assert_told(" ".join(cells[:3]), row["proposed"], row["best"], row["times"])
        assert_told(cells[3], 100 * row["reached"])


def test_how_far_the_best_rates_of_ranks_lie_apart_in_both_units() -> None:
    best = {
        (row["method"], row["subject"], row["steps"], row["rank"]): row["best"] for row in results("auto_rate")["rows"]
    }
    text = " ".join((ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8").split())
    (told,) = re.findall(
        r"best rate at rank 4 is ([\d.]+ to [\d.]+) times .* and ([\d.]+ to [\d.]+) times in these", text
    )
    for method, words in zip(("adamw", "adamw+lora_units=start"), told, strict=True):
        ratios = [
            best[method, *cell, 4] / best[method, *cell, 32] for one, *cell, rank in best if (one, rank) == (method, 4)
        ]
        assert len(ratios) == 4
        assert_told(words, min(ratios), max(ratios))


def test_how_exact_a_step_is() -> None:
    taken = {name: ways["taken"] for name, ways in results("step_accuracy")["cases"].items()}
    hard = {"condition of B 1e7", "B of rank 4 and 1e-5"}
    text = " ".join((ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8").split())
    (within,) = re.findall(r"it is within ([\d.]+) % of the step by eigenvalues", text)
    (beyond,) = re.findall(r"the step is ([\d.]+) % off", text)
    assert_told(within, 100 * max(row["error"] for name, row in taken.items() if name not in hard))
    assert_told(beyond, 100 * max(taken[name]["error"] for name in hard))
    ((least, usual, most),) = re.findall(
        r"differ by (\S+) from `B = 0` and by up to (\S+), but by up to (\S+) where", text
    )
    few = {name for name in taken if "rank 4" in name}
    assert float(least) == pytest.approx(taken["B = 0"]["gauge"], rel=0.2)
    assert float(usual) == pytest.approx(max(taken[name]["gauge"] for name in taken.keys() - few), rel=0.2)
    assert float(most) == pytest.approx(max(taken[name]["gauge"] for name in few), rel=0.2)


def test_the_time_of_a_step() -> None:
    found = results("optimizer_step_cpu")["cases"]
    names = {
        "torch's AdamW, fused": "adamw (torch, fused)",
        "torch's AdamW, foreach": "adamw (torch, foreach)",
        "fused, `--lora_units start`": "adamw, units of the start",
        "`scaled_adamw`, `variant split`": "scaled_adamw, split",
        "PEFT's Riemannian": "riemannian (peft)",
    }
    cases = [f"{model}/{rank}" for model in ("sd15", "sdxl", "flux") for rank in (4, 16, 64)]
    rows = table("README.md", "Step of")
    assert len(rows) == len(found[cases[0]]["optimizers"])
    for name, cells in rows.items():
        key = names.get(name, name.strip("`"))
        for cell, case in zip(cells, cases, strict=True):
            assert_told(cell, found[case]["optimizers"][key]["times_fused_adamw"])


@pytest.mark.parametrize(
    "file", [pytest.param(file, id=file.stem) for file in sorted(RESULTS.glob("gpu_check_*.json"))]
)
def test_the_check_of_a_gpu(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert load("gpu_check").table(found) in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert found["tier"]["status"] == 0 and not found["failed"]


def test_training_on_a_gpu() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert load("gpu_speed").table(results("gpu_speed_h200")) in readme
    other = results("gpu_speed_h200_other_host")["cases"]["sdxl1"]["ours"]
    assert f"[{other['steps_per_s']:.2f}]" in readme
    assert f"[{results('gpu_steps_h200')['forms']['flux-nf4']['peak_gib']:.2f}]" in readme


def test_the_weights_in_fewer_bits() -> None:
    pipelines = load("_random_pipelines")
    rows = table("docs/memory.md", "Weights of")
    names = {"SD 1.5": "sd15", "SDXL": "sdxl", "FLUX.2": "klein", "FLUX.1": "flux"}
    assert len(rows) == len(names)
    for row, cells in rows.items():
        [name] = [name for start, name in names.items() if row.startswith(start)]
        pipeline = pipelines.PIPELINES[name](pipelines.Maker("meta", False))
        stored = Stored.of(getattr(pipeline, "unet", None) or pipeline.transformer)
        for cell, word in zip(cells, (None, "int8", "nf4"), strict=True):
            assert cell == f"{stored.bytes(word) / 2**30:.1f}"


def test_the_cost_of_fewer_bits() -> None:
    found = results("base_precision")
    assert load("base_precision").table(found) in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def test_the_speed_of_training() -> None:
    found = results("train_speed")
    rows = table("README.md", "Training against")
    assert len(rows) == 3
    for name, key in (("diffusers' script", "diffusers script"), ("the same, tuned", "diffusers tuned")):
        ratios = [found["ratios"][f"{figure} / {key}"] for figure in ("rate", "wall time", "peak memory")]
        for cell, ratio in zip(rows[name], ratios, strict=True):
            assert_told(cell, ratio)
    assert_told(rows["the bare step"][0], found["ratios"]["rate / bare step"])
    assert all(found["passed"].values())


def test_what_was_said_of_robustness_before() -> None:
    """Two worst cells of the earlier benchmark."""
    text = " ".join((ROOT / "docs/optimizers.md").read_text(encoding="utf-8").split())
    said = re.search(r"that LoRA-Muon's worst cell is at ([0-9.]+) and AdamW's at ([0-9.]+) ", text)
    assert said
    for number, method in zip(said.groups(), ("lora_muon", "adamw"), strict=True):
        assert_told(number, results("robustness")["methods"][method]["worst"])


@pytest.mark.parametrize("model", list(results("robustness_fair")))
def test_robustness_with_the_same_tuning_for_all(model: str) -> None:
    assert load("robustness").table(results("robustness_fair")[model]) in (ROOT / "docs/optimizers.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("model", list(results("robustness_fair")))
def test_robustness_comes_from_the_committed_trainings(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command of the result, which finds every training made."""
    found, benchmark = results("robustness_fair")[model], load("robustness")
    runs = RESULTS / benchmark.RUNS / f"{model}.jsonl"

    def none_made(bench: Any, tasks: list[Any]) -> tuple[()]:
        assert not tasks, f"{len(tasks)} trainings are not in {runs.name}"
        return ()

    monkeypatch.setattr(benchmark.Bench, "_made", none_made)
    monkeypatch.setattr(
        benchmark.Bench, "usable", lambda bench, methods: [m for m in methods if m.label in found["methods"]]
    )
    benchmark.main([*shlex.split(found["command"])[2:], "--runs", str(runs), "--results", str(tmp_path)])
    again = json.loads((tmp_path / "robustness_fair.json").read_text(encoding="utf-8"))[model]
    of_the_machine = ("command", "left_out", "machine")
    assert again == {**found, **{name: again[name] for name in of_the_machine}}


def test_worst_cells_in_the_readme() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = re.search(
        r"Its worst of twelve cells reaches ([0-9.]+) of the best loss known on the embedded UNet and ([0-9.]+) on the "
        r"embedded transformer; `adamw` with `--lora_units start` reaches ([0-9.]+) on the transformer",
        text,
    )
    assert said
    cells = (("tiny", "lora_muon"), ("tiny-flow", "lora_muon"), ("tiny-flow", "adamw+lora_units=start"))
    for number, (model, method) in zip(said.groups(), cells, strict=True):
        assert_told(number, results("robustness_fair")[model]["methods"][method]["worst"]["score"])


@pytest.mark.parametrize("file", ["README.md", "docs/optimizers.md"])
def test_what_was_chosen_on_the_embedded_model_is_said_beside_its_robustness(file: str) -> None:
    text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
    assert re.search(r"(were|was) chosen on earlier versions of (the|that) benchmark", text)
    assert "does not close the gap" not in text and "the best one in every cell" not in text


def test_the_comparison() -> None:
    found = {method["label"]: method for method in results("compare_embedded")["methods"]}
    rows = table("docs/compare.md", "Method")
    assert set(rows) == {f"`{label}`" for label in found}
    for label, method in found.items():
        rate, difference, images, verdict, steps, seconds = rows[f"`{label}`"]
        assert_told(rate, method["best_lr"])
        delta = method["delta"]
        if delta:
            assert_told(difference, *(delta["pct"][end] for end in ("mean", "low", "high")))
            assert_told(images, delta["images_se_pct"])
        assert verdict == (delta["verdict"] if delta else "baseline")
        for cell, key in ((steps, "steps_to_target"), (seconds, "seconds_to_target")):
            median = method[key]["spread"]["median"]
            if median == "inf":
                assert cell == "never"
            else:
                assert_told(cell, median)


def test_the_quality_of_the_embedded_models() -> None:
    benchmark = load("tiny_quality")
    found = {model: results(benchmark.file_name(model)) for model in tiny.MODELS}
    assert benchmark.table(found) in (ROOT / "docs/embedded-model.md").read_text(encoding="utf-8")
    for of in found.values():
        assert of["targets"] == benchmark.TARGETS
        assert all(of["passed"].values())
        assert all(of["results"][name] >= target for name, target in benchmark.TARGETS.items())
        for kind in ("real", "reconstructed"):  # the same renders, autoencoder and judges, but for rounding
            bounds = found["tiny"]["bounds"][kind]
            assert all(
                of["bounds"][kind][key] == pytest.approx(bounds[key], abs=0.02) for key in benchmark.JUDGED.values()
            )


def test_lora_against_full_fine_tuning() -> None:
    found = results("lora_vs_full")
    (line,) = [
        line
        for line in (ROOT / "docs/embedded-model.md").read_text(encoding="utf-8").splitlines()
        if "LoRA reaches" in line
    ]
    assert_told(line, 100 * found["ratio"])
    assert found["passed"]


def test_the_calibration_of_verdicts() -> None:
    """At most one alarm in ten where there is no difference; one of three percent is always found."""
    found = results("compare_calibration")["results"]
    for draws in ("itself", "itself_default_size"):
        said = found[draws]["verdicts"]
        assert sum(said.values()) == 40 and said.get("better", 0) + said.get("worse", 0) <= 4
    assert found["worse"]["verdicts"] == {"worse": 40}
    text = (ROOT / "docs/compare.md").read_text(encoding="utf-8").partition("## Are the verdicts right?")[2]
    ten, five, worse = [line for line in text.replace("\n  ", " ").splitlines() if line.startswith("- ")][:3]
    for line, said in ((ten, found["itself"]["verdicts"]), (five, found["itself_default_size"]["verdicts"])):
        alarms = said.get("better", 0) + said.get("worse", 0)
        assert f"{alarms} of 40 called better or worse" in line, line
        assert (
            f"{said.get('equivalent', 0)} equivalent" in line and f"{said.get('inconclusive', 0)} inconclusive" in line
        )
    assert f"{found['worse_by_pct'][0]:.1f} % worse" in worse, worse
