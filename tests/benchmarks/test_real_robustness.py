"""The protocol for real models, on made-up trainings and once on the embedded model: what is said of its claims."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamlora.errors import UserError
from tests.benchmarks.test_benchmarks import load


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load("real_robustness")


def row(base: float, final: float | None, images: int = 4) -> dict[str, Any]:
    """A training whose images differ in how hard they are, not in what was learnt of them."""
    hard = [0.1 * k for k in range(images)]
    each = [] if final is None else [[base + h, final + h] for h in hard]
    return {"base": base + sum(hard) / images, "final": None if final is None else final, "images": each}


def rows_of(benchmark: ModuleType, finals: dict[str, list[float | None]]) -> dict[Any, dict[str, Any]]:
    """Losses from 1.0 by method, in the three cells of a subject."""
    return {
        (method, cell): row(1.0, final)
        for method in benchmark.methods(embedded=True)
        if method.label in finals
        for cell, final in zip(benchmark.cells("dog", 400), finals[method.label], strict=True)
    }


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {claim["method"]: claim["verdict"] for claim in found["claims"]}


START = "adamw+lora_units=start"


def test_claims_are_about_methods_that_are_run(benchmark: ModuleType) -> None:
    labels = {method.label for method in benchmark.methods(embedded=False)}
    assert all({claim.method, *claim.than} <= labels and claim.method not in claim.than for claim in benchmark.CLAIMS)
    assert all(len(method.settings) == 1 for method in benchmark.methods(embedded=False)), "the same budget"


def test_a_claim_holds_if_it_does_against_all_it_names(benchmark: ModuleType) -> None:
    finals = {
        "adamw": [0.5, 0.5, 0.8],
        START: [0.6, 0.55, 0.6],
        "scaled_adamw": [0.6, 0.6, 0.7],
        "lora_muon": [0.5] * 3,
    }
    found = benchmark.judge(rows_of(benchmark, finals), [])
    assert found["worst"] == pytest.approx({"adamw": 0.4, START: 0.8, "scaled_adamw": 0.6, "lora_muon": 1.0})
    assert verdicts(found) == {"scaled_adamw": "does not hold", START: "holds", "lora_muon": "holds"}
    assert found["images"] == {"dog": 4}


def test_a_method_that_is_missing_decides_nothing(benchmark: ModuleType) -> None:
    found = benchmark.judge(rows_of(benchmark, {"adamw": [0.5] * 3, "scaled_adamw": [0.4] * 3}), [])
    assert verdicts(found)["scaled_adamw"] == "not decided", "better than AdamW, but it names another"
    assert verdicts(found)[START] == "not decided"


def test_images_decide_how_sure_a_difference_is(benchmark: ModuleType) -> None:
    """The same means: learnt alike of all images, or all of it of one."""
    even = rows_of(benchmark, {"adamw": [0.6] * 3, START: [0.5] * 3})
    uneven = {
        key: {**value, "images": [[1.0, 1.0 - 4 * (1.0 - value["final"])], *[[1.0, 1.0]] * 3]}
        if key[0].label == START
        else value
        for key, value in even.items()
    }
    assert verdicts(benchmark.judge(even, []))[START] == "holds"
    assert verdicts(benchmark.judge(uneven, []))[START] == "not decided"


def test_what_breaks_off_never_holds(benchmark: ModuleType) -> None:
    finals: dict[str, list[float | None]] = {"adamw": [0.5] * 3, START: [0.4, None, 0.4], "lora_muon": [None] * 3}
    found = benchmark.judge(rows_of(benchmark, finals), [])
    assert found["worst"][START] == found["worst"]["lora_muon"] == "-inf"
    assert verdicts(found)[START] == verdicts(found)["lora_muon"] == "does not hold"
    finals["adamw"] = [None, 0.5, 0.5]
    finals[START] = [0.4] * 3
    found = benchmark.judge(rows_of(benchmark, finals), [])
    assert verdicts(found)[START] == "holds"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("difference", "se", "word"),
    [
        (0.1, 0.04, "holds"),
        (0.1, 0.06, "not decided"),
        (0.01, 0.001, "holds"),
        (0.0, 0.001, "does not hold"),
        (-0.1, 0.2, "not decided"),
        (-0.1, 0.02, "does not hold"),
        (math.nan, 0.0, "does not hold"),
    ],
)
def test_words(benchmark: ModuleType, difference: float, se: float, word: str) -> None:
    assert benchmark.decided(difference, se) == word


def test_a_rate_at_the_end_of_its_grid_is_said_beside_the_word(benchmark: ModuleType) -> None:
    from dreamlora.compare.numbers import EDGE_TEXT

    rows = rows_of(benchmark, {"adamw": [0.6] * 3, START: [0.5] * 3})
    assert verdicts(benchmark.judge(rows, ["adamw"]))[START] == f"holds ({EDGE_TEXT}: adamw)"
    choice = load("_robustness_protocol").Choice
    robustness = load("_robustness")
    method = robustness.Method("adamw", ("betas=0.9,0.999",), 1e-3)
    configs = [robustness.Config(method, "betas=0.9,0.999", rate) for rate in (1e-3, 2e-3, 4e-3)]
    for config, names in zip(configs, (["adamw"], [], ["adamw"]), strict=True):
        assert benchmark.edges({method: choice(config, dict.fromkeys(configs, 0.0))}) == names


def test_real_models_take_folders_with_enough_images(benchmark: ModuleType, tmp_path: Path) -> None:
    for name, count in (("a", 8), ("b", 8), ("c", 7)):
        (tmp_path / name).mkdir()
        for k in range(count):
            Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / name / f"{k}.png")
    folders = [tmp_path / name for name in "abc"]
    words = ["--subjects", *map(str, folders), "--prompts", "x", "y", "z", "--runs", str(tmp_path / "runs.jsonl")]
    options = benchmark.parsed(words)
    bench = benchmark.bench_of(options)
    method = benchmark.methods(embedded=False)[0]
    task = bench.task(benchmark.cells("b", 400)[1], load("_robustness").Config(method, method.settings[0], 2e-4), 1)
    given = dict(zip(task.words, [*task.words[1:], ""], strict=True))
    assert (given["--instance_data_dir"], given["--instance_prompt"]) == (str(tmp_path / "b"), "y")
    assert (given["--mixed_precision"], given["--holdout"], given["--max_train_steps"]) == ("bf16", "4", "400")
    benchmark.check_images(bench, folders[:2])
    with pytest.raises(UserError, match=r"c: 7 images; give at least 8, 4 are held out"):
        benchmark.check_images(bench, folders)


@pytest.mark.parametrize(
    "words", [[], ["--model", "tiny", "--prompts", "x", "y", "z"], ["--subjects", "a", "b/a", "c", "--prompts", *"xyz"]]
)
def test_subjects_that_do_not_fit_the_model_are_refused(benchmark: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parsed(words)


def test_one_command_on_the_embedded_model(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real trainings of two steps, of two methods in one cell."""
    monkeypatch.setattr(benchmark, "METHODS", {"adamw": (2e-4, 4e-3), "lora_muon": (1e-2, 0.18)})
    monkeypatch.setattr(benchmark, "CELLS", benchmark.CELLS[:1])
    words = ["--model", "tiny", "--quick", "--steps", "2", "--batch", "1", "--runs", str(tmp_path / "runs.jsonl")]
    benchmark.main([*words, "--results", str(tmp_path)])
    found = json.loads((tmp_path / "real_robustness_tiny.json").read_text(encoding="utf-8"))
    assert set(found["worst"]) == {"adamw", "lora_muon"} and set(found["images"].values()) == {8}
    assert len((tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert benchmark.table(found) in capsys.readouterr().out
    assert np.isfinite([against["se"] for claim in found["claims"] for against in claim["against"]]).all()
