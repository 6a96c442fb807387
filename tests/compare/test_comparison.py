"""Run folders to compare.json: choosing, pairing, refusing, and what is said of it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from dreamlora import compare, metrics
from dreamlora.compare.records import data_name, lora_norm, read_record
from dreamlora.compare.schema import Comparison
from dreamlora.compare.verdict import table
from dreamlora.errors import UserError
from dreamlora.jsonl import append_jsonl
from dreamlora.report.comparison import ComparisonFile
from dreamlora.runfolder import RunFolder
from tests.compare.synthetic import BASE, Curve, make_comparison, make_run

RATES = (2e-4, 2e-3, 2e-2)
NOTHING_KNOWN = compare.ComparisonPlan()


def compared(root: Path, plan: compare.ComparisonPlan = NOTHING_KNOWN) -> Comparison:
    return compare.compare_runs(sorted(file.parent for file in root.rglob("config.yaml")), root, plan)


def by_label(comparison: Any) -> dict[str, Any]:
    return {method["label"]: method for method in comparison["methods"]}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The synthetic comparison of three methods, read back from the file."""
    root = tmp_path_factory.mktemp("comparison")
    plan = make_comparison(root)
    return json.loads(
        compare.write_comparison(compared(root, plan), root).read_text(encoding="utf-8"), parse_constant=pytest.fail
    )


def test_each_method_is_judged_at_its_own_best_rate(example: dict[str, Any]) -> None:
    methods = by_label(example)
    assert [method["label"] for method in example["methods"]] == ["adamw", "scaled_adamw:variant=split", "sgd"]
    assert methods["adamw"]["best_lr"] == 2e-3
    assert methods["scaled_adamw:variant=split"]["best_lr"] == 6.32e-3
    assert methods["scaled_adamw:variant=split"]["optimizer_args"] == {"variant": "split"}
    delta = methods["scaled_adamw:variant=split"]["delta"]
    assert delta["pct"]["mean"] == pytest.approx(100 * (0.445 / 0.46 - 1), abs=0.5)
    assert (delta["word"], delta["wins"], delta["suffixes"]) == ("better", 5, [])
    assert methods["adamw"]["delta"] is None and example["baseline"] == "adamw"


def test_the_numbers_are_of_fresh_seeds(example: dict[str, Any]) -> None:
    assert example["fresh_seeds"] and example["complete"]
    for method in example["methods"]:
        assert method["tuning_seeds"] == [0, 1, 2]
        assert method["headline_seeds"] == [3, 4, 5, 6, 7]
    roles = {run["id"]: run["role"] for run in example["runs"]}
    assert roles["runs/adamw/lr0.002/seed3"] == "headline" and roles["runs/adamw/lr0.002/seed0"] == "tuning"


def test_runs_that_diverged_count_as_the_worst(example: dict[str, Any]) -> None:
    adamw = by_label(example)["adamw"]
    assert adamw["n_diverged"] == 3 and adamw["rates"][-1]["score"] == "inf"
    assert adamw["rates"][-1]["final"] == {"median": "inf", "min": "inf", "max": "inf", "n": 3}
    (row,) = (run for run in example["runs"] if run["id"] == "runs/adamw/lr0.02/seed1")
    assert (row["status"], row["final"], row["steps_to_target"]) == ("diverged", "inf", "inf")
    assert row["log_auc"] == "inf"


def test_the_edge_of_the_grid_is_told(example: dict[str, Any]) -> None:
    sgd = by_label(example)["sgd"]
    assert sgd["at_grid_edge"] == "high" and sgd["suggested_lrs"] == [63.3, 200.0]
    assert sgd["delta"]["verdict"] == "worse; LR grid edge (sgd)"
    assert any("Try --learning_rates 63.3 200" in text for text in example["warnings"])


def test_target_and_steps_to_it(example: dict[str, Any]) -> None:
    """The target is 1 % above the baseline's median best; the worse method never gets there."""
    methods = by_label(example)
    assert example["target"] == pytest.approx(1.01 * methods["adamw"]["final"]["median"], rel=1e-6)
    sgd = methods["sgd"]["steps_to_target"]
    assert (sgd["spread"]["median"], sgd["reached"], sgd["speedup"]) == ("inf", 0, None)
    fast = methods["scaled_adamw:variant=split"]
    assert fast["steps_to_target"]["reached"] == 5 and fast["steps_to_target"]["speedup"] > 1
    seconds, steps = fast["seconds_to_target"]["spread"]["median"], fast["steps_to_target"]["spread"]["median"]
    assert seconds == pytest.approx(steps / 8.0)  # 8 steps per second were logged


def test_curves_bands_and_octiles(example: dict[str, Any]) -> None:
    method = by_label(example)["scaled_adamw:variant=split"]
    band = method["curve"]
    assert band["steps"][0] == 0 and band["mean"][0] == pytest.approx(BASE)
    assert all(low <= mean <= high for low, mean, high in zip(band["low"], band["mean"], band["high"], strict=True))
    assert [row["octile"] for row in method["octiles"]] == list(range(8))
    assert method["octiles"][3]["pct"]["mean"] == pytest.approx(method["delta"]["pct"]["mean"], rel=1e-4)


def test_same_rate_table_has_the_rates_that_both_tried(example: dict[str, Any]) -> None:
    rows = [row for row in example["same_lr"] if row["method"].startswith("scaled")]
    assert [row["lr"] for row in rows] == [0.000632, 0.002, 0.00632, 0.02]
    assert rows[-1]["baseline_diverged"] == 3 and rows[-1]["pct"]["mean"] == "-inf" and rows[-1]["pct"]["n"] == 3
    assert not [row for row in example["same_lr"] if row["method"] == "sgd"]


def test_image_metrics_and_samples(example: dict[str, Any]) -> None:
    adamw = by_label(example)["adamw"]
    assert {(row["name"], row["at"]) for row in adamw["images"]} == {
        (name, at) for name in ("img/clip_t", "img/dino") for at in ("final", "best")
    }
    assert adamw["images"][0]["encoder_id"] == "tiny-clip" and adamw["images"][0]["value"]["n"] == 5
    samples = adamw["samples"]
    assert samples["steps"] == [0, 75, 150] and samples["training_seed"] == 3
    assert samples["cells"][0]["file"] == "runs/adamw/lr0.002/seed3/samples/step_000000/p00_s42.png"


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    plan = make_comparison(tmp_path)
    first = compare.write_comparison(compared(tmp_path, plan), tmp_path).read_bytes()
    assert compare.write_comparison(compared(tmp_path, plan), tmp_path).read_bytes() == first


def test_a_method_with_a_long_name_can_be_read_again(tmp_path: Path) -> None:
    for label, seed, text in (("adamw", 0, "a"), ("adamw", 1, "a"), ("adamw+b", 0, "b" * 3000)):
        make_run(tmp_path, label, 2e-3, seed, lora_target_modules=text)
    folders = sorted(file.parent for file in tmp_path.rglob("config.yaml"))
    for folder in folders:
        (folder / "outcome.json").unlink()
    compare.write_comparison(compare.compare_runs(folders, tmp_path), tmp_path)
    assert max(map(len, ComparisonFile(tmp_path).labels)) > 3000


def test_what_does_not_fit_into_compare_json_is_said_before_the_last_one_is_lost(tmp_path: Path) -> None:
    for method in ("adamw", "sgd"):
        make_run(tmp_path, method, 2e-3, 0)
    found = compared(tmp_path)
    before = compare.write_comparison(found, tmp_path).read_bytes()
    with pytest.raises(UserError, match=r"does not fit into compare.json: warnings.0: .*at most 65536 characters"):
        compare.write_comparison({**found, "warnings": ["a" * 70_000]}, tmp_path)
    assert (tmp_path / compare.COMPARE_FILE).read_bytes() == before


def test_words_name_budget_and_limits(example: dict[str, Any]) -> None:
    budget = " ".join(example["budget"])
    assert "adamw: 20 runs; 5 learning rates" in budget and "One subject (checkerling)" in budget
    assert "come from runs with other seeds" in budget
    assert example["sentence"].startswith("scaled_adamw:variant=split: loss −3.6\u202f% [−4.0, −3.2] against adamw")
    assert "never" in table(example)  # type: ignore[arg-type]


def test_existing_runs_of_the_same_seeds_are_not_called_fresh(tmp_path: Path) -> None:
    for method, best in (("adamw", 0.46), ("scaled_adamw", 0.45)):
        for lr in RATES:
            for seed in (0, 1, 2):
                make_run(tmp_path, method, lr, seed, Curve(best=best))
    found = compared(tmp_path)
    assert not found["fresh_seeds"]
    assert by_label(found)["scaled_adamw"]["headline_seeds"] == [0, 1, 2]
    assert any("flatters" in line for line in found["budget"])


def test_fresh_seeds_are_recognised(tmp_path: Path) -> None:
    for lr in RATES:
        make_run(tmp_path, "adamw", lr, 0)
    for seed in (1, 2, 3):
        make_run(tmp_path, "adamw", 2e-3, seed)
    found = compared(tmp_path)
    assert found["fresh_seeds"] and found["methods"][0]["headline_seeds"] == [1, 2, 3]


def test_a_failed_tuning_run_makes_no_fresh_seed(tmp_path: Path) -> None:
    """Seed 3 of AdamW is there at the best rate alone, as it failed at the others."""
    for method in ("adamw", "sgd"):
        for lr in RATES:
            for seed in (0, 1, 2, 3):
                if method == "sgd" or seed < 3 or lr == 2e-3:
                    make_run(tmp_path, method, lr, seed)
    found = compared(tmp_path)
    assert not found["fresh_seeds"]
    methods = by_label(found)
    assert methods["adamw"]["tuning_seeds"] == [0, 1, 2]
    assert methods["adamw"]["headline_seeds"] == methods["sgd"]["headline_seeds"] == [0, 1, 2, 3]
    assert methods["sgd"]["delta"]["pct"]["n"] == 4


def test_two_more_seeds_at_the_best_rate_join_the_others(tmp_path: Path) -> None:
    for method in ("adamw", "sgd"):
        for lr in RATES:
            for seed in (0, 1, 2):
                make_run(tmp_path, method, lr, seed)
        for seed in (3, 4):
            make_run(tmp_path, method, 2e-3, seed)
    found = compared(tmp_path)
    assert not found["fresh_seeds"] and by_label(found)["sgd"]["delta"]["pct"]["n"] == 5


def test_a_rate_is_judged_by_the_median_of_all_its_seeds(tmp_path: Path) -> None:
    """By the first seed, or by the mean, 2e-4 would win."""
    losses = {2e-4: (0.40, 0.46, 0.46), 2e-3: (0.53, 0.44, 0.44)}
    for lr, finals in losses.items():
        for seed, final in enumerate(finals):
            own = final * math.exp(-random.Random(seed).gauss(0, 0.004))  # the noise that make_run adds to a seed
            make_run(tmp_path, "adamw", lr, seed, Curve(best_lr=lr, best=own))
    method = compared(tmp_path)["methods"][0]
    assert method["best_lr"] == 2e-3
    assert [point["score"] for point in method["rates"]] == pytest.approx([0.46, 0.44])


def test_one_rate_is_not_tuned(tmp_path: Path) -> None:
    for method in ("adamw", "sgd"):
        for seed in (0, 1, 2):
            make_run(tmp_path, method, 2e-3, seed)
    delta = by_label(compared(tmp_path))["sgd"]["delta"]
    assert delta["suffixes"] == ["not tuned: LR effect and optimizer effect cannot be separated"]


def test_two_seeds_are_insufficient(tmp_path: Path) -> None:
    for method, best in (("adamw", 0.46), ("sgd", 0.40)):
        for seed in (0, 1):
            make_run(tmp_path, method, 2e-3, seed, Curve(best=best))
    delta = by_label(compared(tmp_path))["sgd"]["delta"]
    assert delta["word"] == "insufficient seeds" and delta["pct"]["low"] is None


def test_a_method_that_always_diverges_is_worse(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        for lr in RATES:
            make_run(tmp_path, "adamw", lr, seed)
            make_run(tmp_path, "sgd", lr, seed, Curve(diverges_at=0))
    sgd = by_label(compared(tmp_path))["sgd"]
    assert sgd["best_lr"] is None and sgd["delta"]["word"] == "worse"
    assert "sgd diverged or failed at every learning rate" in sgd["delta"]["verdict"]
    assert compared(tmp_path)["sentence"] == "sgd: diverged or failed at every learning rate, unlike adamw: worse."


def test_a_method_with_a_diverged_seed_is_not_better(tmp_path: Path) -> None:
    for lr in RATES:
        for method in ("adamw", "sgd"):
            make_run(tmp_path, method, lr, 0)
    for seed in (1, 2, 3, 4):
        make_run(tmp_path, "adamw", 2e-3, seed)
        make_run(tmp_path, "sgd", 2e-3, seed, Curve(best=0.4, diverges_at=0 if seed == 4 else math.inf))
    delta = by_label(compared(tmp_path))["sgd"]["delta"]
    assert delta["pct"]["n"] == 4 and delta["verdict"] == "inconclusive; 1 of 4 seeds of sgd diverged"


def with_final_sets(root: Path, losses: dict[str, np.ndarray], final_set: str = "f" * 16) -> None:
    """Three runs of each method, whose items of the larger set end with ``losses`` ``[16 items]``, four per image."""
    for method, items in losses.items():
        for seed in (0, 1, 2):
            folder = make_run(root, method, 2e-3, seed, final_set=final_set)
            rows = np.array([np.ones(16), items * (1 + 0.01 * seed)])
            image = np.repeat(np.arange(4), 4)
            np.savez(
                folder.final_items_file, steps=[0, 150], items=rows, position=rows[0], image=image, evalset_id=final_set
            )


def test_the_larger_set_decides_where_all_have_measured_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    theirs, apart = rng.uniform(0.4, 0.6, 16), rng.normal(0.02, 0.01, 16)
    with_final_sets(tmp_path, {"adamw": theirs, "sgd": theirs - apart})
    found = compared(tmp_path)
    delta = by_label(found)["sgd"]["delta"]
    assert delta["pct"]["mean"] == pytest.approx(100 * ((theirs - apart).mean() / theirs.mean() - 1), rel=1e-6)
    by_image = 1.01 * apart.reshape(4, 4).mean(1)  # 1.01: mean over the seeds
    expected = 100 * by_image.std(ddof=1) / 2 / (1.01 * theirs.mean())
    assert delta["images_se_pct"] == pytest.approx(expected, rel=1e-5)  # losses of items are read as float32
    assert by_label(found)["sgd"]["final"]["median"] == pytest.approx(1.01 * (theirs - apart).mean())
    assert by_label(found)["sgd"]["vs_base_pct"] == pytest.approx(100 * (1.01 * (theirs - apart).mean() - 1))
    assert (found["task"]["eval_items"], found["task"]["eval_images"]) == (16, 4)
    assert any("on 16 items of 4 images" in line for line in found["budget"])


def test_the_curves_decide_where_the_larger_sets_differ(tmp_path: Path) -> None:
    with_final_sets(tmp_path / "a", {"adamw": np.full(16, 0.5)})
    with_final_sets(tmp_path / "b", {"sgd": np.full(16, 0.1)}, final_set="another")
    found = compared(tmp_path)
    assert by_label(found)["sgd"]["delta"]["pct"]["mean"] == pytest.approx(0)
    assert by_label(found)["sgd"]["delta"]["images_se_pct"] is None
    assert found["task"]["final_evalset_id"] is None and found["task"]["eval_items"] == 64


def test_p_values_and_alarms_are_not_averaged(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        folder = make_run(tmp_path, "adamw", 2e-3, seed, pictures=True)
        text = folder.metrics_file.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if "img/dino" in line]
        rows = [
            line.replace("img/dino", name) for name in ("img/kid", "img/kid_p", "img/clip_t_change") for line in lines
        ]
        folder.metrics_file.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")
    names = {row["name"] for row in compared(tmp_path)["methods"][0]["images"]}
    assert names == {"img/clip_t", "img/dino", "img/kid"}


def test_a_captioned_data_set_is_named_after_its_folder_or_style(tmp_path: Path) -> None:
    for options, expected in (({"train_data_dir": "/data/cats"}, "cats"), ({"style": "woodcut"}, "woodcut")):
        config = {"subject": None, "instance_data_dir": None, **options}
        assert data_name(config) == expected


def test_options_make_methods_of_one_optimizer(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path / "a", "adamw", 2e-3, seed)
        make_run(tmp_path / "b", "adamw", 2e-3, seed, rank=16)
    for file in tmp_path.rglob("outcome.json"):
        file.unlink()  # runs that the comparison program has not made
    found = compared(tmp_path)
    assert [method["label"] for method in found["methods"]] == ["adamw", "adamw+rank=16"]
    assert found["methods"][1]["options"] == {"rank": "16"}
    assert any("differ in rank (adamw: 4, adamw+rank=16: 16)" in text for text in found["warnings"])


def test_units_make_methods_of_one_optimizer(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path / "a", "adamw", 2e-3, seed)
        make_run(tmp_path / "b", "adamw", 6e-3, seed, lora_units="start")
    for file in tmp_path.rglob("outcome.json"):
        file.unlink()  # runs that the comparison program has not made
    found = compared(tmp_path)
    assert [method["label"] for method in found["methods"]] == ["adamw", "adamw+lora_units=start"]
    assert any("differ in lora_units (adamw: plain, " in text for text in found["warnings"])


def test_an_option_that_a_run_is_too_old_to_know_makes_no_method(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        make_run(tmp_path, "adamw", 2e-3, seed)
        old = make_run(tmp_path, "sgd", 2.0, seed)
        config = yaml.safe_load(old.config_file.read_text(encoding="utf-8"))
        del config["lora_units"]
        old.config_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert not any("lora_units" in text for text in compared(tmp_path)["warnings"])


def test_what_is_measured_makes_no_method(tmp_path: Path) -> None:
    """Runs that choose a rate draw and keep less than those that are compared."""
    for seed, options in ((0, {"save_best": False, "eval_metrics": []}), (1, {"eval_metrics": ["dino"]})):
        for method in ("adamw", "sgd"):
            make_run(tmp_path, method, 2e-3, seed, **options)
    assert not any("differ in" in text for text in compared(tmp_path)["warnings"])


def test_how_a_model_is_held_makes_no_method_and_what_its_weights_are_rounded_to_does(tmp_path: Path) -> None:
    """Cards of several sizes make runs of one method; the numbers are the same, but for rounding at most."""
    held = {"vram": "12", "gradient_checkpointing": True, "offload_blocks": 3, "text_encoder_device": "cpu"}
    computed = {"compile": True, "attention_backend": "flash", "channels_last": True, "parity": "full"}
    for seed, options in ((0, {}), (1, held), (2, computed | {"parity_check": False})):
        make_run(tmp_path, "adamw", 2e-3, seed, **options)
    make_run(tmp_path / "other", "adamw", 2e-3, 0, base_precision="nf4")
    for file in tmp_path.rglob("outcome.json"):
        file.unlink()  # runs that the comparison program has not made
    assert [method["label"] for method in compared(tmp_path)["methods"]] == ["adamw", "adamw+base_precision=nf4"]


def test_rates_are_judged_by_the_seeds_they_share(tmp_path: Path) -> None:
    for lr, seeds in ((2e-4, (0, 1)), (2e-3, (0, 1)), (2e-2, (0,))):
        for seed in seeds:
            make_run(tmp_path, "adamw", lr, seed, Curve(best_lr=2e-4))
    found = compared(tmp_path)
    assert found["methods"][0]["tuning_seeds"] == [0]
    assert [row["run"] for row in found["dropped"]] == ["runs/adamw/lr0.002/seed1"]


def test_runs_that_have_not_ended_are_dropped(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0)
    make_run(tmp_path, "adamw", 2e-3, 1, ended=False)
    assert compared(tmp_path)["dropped"] == [{"run": "runs/adamw/lr0.002/seed1", "reason": "it has not ended"}]


# What is refused


def refusal(root: Path, plan: compare.ComparisonPlan = NOTHING_KNOWN) -> str:
    with pytest.raises(UserError) as error:
        compared(root, plan)
    return str(error.value)


def test_foreign_evaluation_sets_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0, evalset="a1b2")
    make_run(tmp_path, "sgd", 2e-3, 0, evalset="c3d4")
    text = refusal(tmp_path)
    assert "cannot pair runs: evalset a1b2 (run runs/adamw/lr0.002/seed0) != c3d4 (run runs/sgd" in text


def test_a_run_without_base_evaluation_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0, steps=(25, 50))
    assert "no base-model evaluation" in refusal(tmp_path)


def test_no_common_seed_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0)
    make_run(tmp_path, "sgd", 2e-3, 1)
    assert "adamw has seeds 0, sgd has 1" in refusal(tmp_path)


def test_no_seed_common_to_the_rates_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0)
    make_run(tmp_path, "adamw", 2e-2, 1)
    assert "no seed was run at all of its learning rates (0.002, 0.02)" in refusal(tmp_path)


def test_nothing_that_has_ended_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0, ended=False)
    assert "no run to compare that has ended" in refusal(tmp_path)


def of_images(folder: RunFolder, images_id: str, name: str = "img/clip_t") -> None:
    """Note that a metric's values are of these images."""
    rows = [{**row, "images_id": images_id} if row["name"] == name else row for row in folder.metrics()]
    folder.metrics_file.write_text("", encoding="utf-8")
    append_jsonl(folder.metrics_file, rows)


def test_metrics_of_other_prompts_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    for method in ("adamw", "sgd"):
        of_images(make_run(tmp_path, method, 2e-3, 0, Curve(2e-3, 0.45, 0.01), pictures=True), method)
    found = compared(tmp_path)
    assert {row["name"] for method in found["methods"] for row in method["images"]} == {"img/dino"}
    (told,) = [text for text in found["warnings"] if "clip_t" in text]
    assert told == (
        "clip_t cannot be compared: the images of run runs/sgd/lr0.002/seed0 have other prompts, seeds or settings "
        "than those of run runs/adamw/lr0.002/seed0."
    )


def test_of_a_run_that_was_resumed_with_other_prompts_the_last_ones_count(tmp_path: Path) -> None:
    for method in ("adamw", "sgd"):
        folder = make_run(tmp_path, method, 2e-3, 0, Curve(2e-3, 0.45, 0.01), pictures=True)
        of_images(folder, "new")
        old = {"v": 1, "step": 1, "name": "img/clip_t", "value": 99.0, "n": 16, "encoder_id": "tiny-clip"}
        rows = folder.metrics()
        folder.metrics_file.write_text("", encoding="utf-8")
        append_jsonl(folder.metrics_file, [{**old, "images_id": "old"}, *rows])
    found = by_label(compared(tmp_path))["adamw"]["images"]
    assert all(row["value"]["mean"] < 1 for row in found if row["name"] == "img/clip_t") and len(found) == 4


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0, pictures=True)
    other = make_run(tmp_path, "sgd", 2e-3, 0, pictures=True)
    other.metrics_file.write_text(other.metrics_file.read_text(encoding="utf-8").replace("tiny-clip", "dino"))
    assert "cannot compare img/clip_t: run runs/adamw/lr0.002/seed0 has encoder tiny-clip" in refusal(tmp_path)


def with_numbers(root: Path, name: str, field: str = "n") -> Path:
    """Two runs with a metric of 16 images and of 8."""
    for method, count in (("adamw", 16), ("sgd", 8)):
        file = make_run(root, method, 2e-3, 0, pictures=True).metrics_file
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [{**row, "name": name, field: count} if row["name"] == "img/dino" else row for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root


def message(name: str) -> str:
    runs = (f"run runs/{method}/lr0.002/seed0 has encoder tiny-clip and n=" for method in ("adamw", "sgd"))
    return (
        f"cannot compare {name}: " + "{}, ".join(runs) + "{}; evaluate both with the same encoder and number of images"
    )


@pytest.mark.parametrize("name", [plugin.NAME for plugin in metrics.by_value().values() if plugin.COMPARES_SETS])
def test_distances_of_sets_of_other_sizes_are_refused(tmp_path: Path, name: str) -> None:
    assert message(name).format(16, 8) in refusal(with_numbers(tmp_path, name))


def test_so_are_those_against_sets_of_other_sizes(tmp_path: Path) -> None:
    refused = refusal(with_numbers(tmp_path, "img/kid", "n_other"))
    assert message("img/kid").format("16 against 16", "16 against 8") in refused


@pytest.mark.parametrize("installed", [True, False])
def test_so_are_those_of_a_metric_from_elsewhere(
    tmp_path: Path, installed: bool, request: pytest.FixtureRequest
) -> None:
    """Whether it is in the folder of metrics and says that it compares sets, or nothing is known of it here."""
    if installed:
        request.getfixturevalue("glow")
    assert message("img/glow").format(16, 8) in refusal(with_numbers(tmp_path, "img/glow"))


def test_means_over_other_numbers_of_images_are_compared(tmp_path: Path, glow: ModuleType) -> None:
    glow.COMPARES_SETS = False
    for name in ("img/clip_i", "img/glow"):
        assert compared(with_numbers(tmp_path / name, name))["methods"]


def test_an_unknown_baseline_lists_the_methods(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0)
    assert "--baseline sgd: no such method" in refusal(tmp_path, compare.ComparisonPlan(baseline="sgd"))


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, "adamw", 2e-3, 0).config_file.write_text("rank: [", encoding="utf-8")
    assert "cannot read" in refusal(tmp_path)


# Parts


def test_lora_norm_is_that_of_the_product(tmp_path: Path) -> None:
    """Linear layers and a convolution, against the explicit products."""
    rng = np.random.default_rng(0)
    shapes = {"unet.a": ((3, 7), (5, 3)), "unet.conv": ((3, 4, 3, 3), (6, 3, 1, 1))}
    tensors, total = {}, 0.0
    for name, (down, up) in shapes.items():
        a, b = rng.normal(size=down).astype(np.float32), rng.normal(size=up).astype(np.float32)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        total += float(np.linalg.norm(2 * b.reshape(len(b), -1) @ a.reshape(len(a), -1)) ** 2)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert lora_norm(tmp_path / "lora.safetensors", 2.0) == pytest.approx(math.sqrt(total), rel=1e-6)


def test_log_auc_leaves_the_base_model_out(tmp_path: Path) -> None:
    record = read_record(make_run(tmp_path, "adamw", 2e-3, 0).path, "run")
    expected = np.mean([math.log(loss / BASE) for step, loss in zip(record.steps, record.losses, strict=True) if step])
    assert record.log_auc == pytest.approx(expected)


def test_seconds_count_training_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "adamw", 2e-3, 0)
    rows = [json.loads(line) for line in folder.metrics_file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["name"] == "train/steps_per_s":
            row["value"] = 2.0 if row["step"] <= 50 else 4.0
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    record = read_record(folder.path, "run")
    assert record.seconds[record.steps.index(50)] == pytest.approx(25)
    assert record.seconds[-1] == pytest.approx(25 + 25)


def test_rates_that_differ_by_rounding_are_the_same(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "adamw", 2e-3, 0)
    config = yaml.safe_load(folder.config_file.read_text(encoding="utf-8"))
    folder.config_file.write_text(yaml.safe_dump({**config, "learning_rate": 0.0020000000001}), encoding="utf-8")
    assert read_record(folder.path, "run").lr == 2e-3


def test_runs_that_find_their_rates_are_one_method_and_nothing_was_chosen_for_them(tmp_path: Path) -> None:
    for seed, rate in enumerate((1.8e-3, 2.1e-3, 2.4e-3, 1.6e-3)):
        make_run(tmp_path, "adamw", 2e-3, seed)
        folder = make_run(tmp_path, "adamw+learning_rate=auto", rate, seed)
        folder.range_test_file.write_text(json.dumps({"learning_rate": rate}), encoding="utf-8")
        for run in (folder, RunFolder(tmp_path / "runs" / "adamw" / "lr0.002" / f"seed{seed}")):
            run.outcome_file.unlink()  # who made them is not known
    comparison = compared(tmp_path)
    method = by_label(comparison)["adamw+learning_rate=auto"]
    assert method["headline_seeds"] == [0, 1, 2, 3]
    assert method["found_lrs"] == [1.6e-3, 1.8e-3, 2.1e-3, 2.4e-3]
    assert method["best_lr"] is None and not method["rates"] and not method["lr_basin"], "none was tried"
    assert not comparison["same_lr"] and not by_label(comparison)["adamw"]["found_lrs"]
    row = next(line for line in table(comparison).splitlines() if line.startswith("adamw+learning_rate=auto"))
    assert "found by each run, 0.0016 to 0.0024" in row
    assert (method["tuned"], method["at_grid_edge"], method["n_runs"]) == (True, None, 4)
    (line,) = [line for line in comparison["budget"] if line.startswith("adamw+learning_rate=auto")]
    assert "the rate that its own range test found (0.0016 to 0.0024)" in line
    assert not any("adamw+learning_rate=auto was run at one" in text for text in comparison["warnings"])
