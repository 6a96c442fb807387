"""Failing never pays: a run that ends worse, or not at all, makes its method look no better anywhere."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dreamlora import compare
from dreamlora.compare import stats
from dreamlora.compare.verdict import table
from dreamlora.figures import interval
from dreamlora.report.comparison import ComparisonFile
from dreamlora.runfolder import RunFolder
from tests.compare.synthetic import BASE, Curve, make_run, spoil

WAYS = [BASE * 1.001, BASE * 1.3, BASE * 1e4, math.inf, math.nan, "diverged", "failed"]
HEADLINE = (1, 2, 3, 4, 5)
DRAWS = {
    "better": (-3.0, -3.2, -2.9, -3.1, -3.0),
    "better but for a seed": (-3.0, -3.2, -2.9, -3.1, 9.0),
    "equal": (0.1, -0.1, 0.2, 0.0, -0.2),
    "far too good once": (-1.0, -1.1, -0.9, -1.0, -12.0),
    "noisy": (-4.0, 5.0, 1.0, -2.0, 3.0),
    "worse": (1.0, 1.2, 1.1, 0.9, 1.0),
}
"""Loss against the baseline's, in percent, by seed."""
STANDING = {"worse": 0, "insufficient seeds": 1, "inconclusive": 1, "equivalent": 2, "better": 3}


def run(root: Path, method: str, lr: float, seed: int, final: float) -> RunFolder:
    """A run with exactly this loss at its end."""
    own = final * math.exp(-random.Random(seed).gauss(0, 0.004))  # what make_run adds to a seed
    return make_run(root, method, lr, seed, Curve(best_lr=lr, best=own), steps=(0, 5, 10))


def compared(root: Path) -> Any:
    plan = compare.ComparisonPlan(headline_seeds=HEADLINE)
    return compare.compare_runs(sorted(file.parent for file in root.rglob("config.yaml")), root, plan)


def sgd_of(found: Any) -> Any:
    return next(method for method in found["methods"] if method["label"] == "sgd")


def figures(root: Path) -> dict[str, float]:
    """What a reader judges the method "sgd" by; the higher, the worse."""
    found = compared(root)
    ours = sgd_of(found)
    compare.write_comparison(found, root)
    lines = ComparisonFile(root).findings
    place = [line.startswith("sgd") for line in lines].index(True)
    return {
        "verdict": -STANDING[ours["delta"]["word"]],
        "mean": float(ours["delta"]["pct"]["mean"]),
        "wins": -ours["delta"]["wins"],
        "rank": place,
        "median loss": float(ours["final"]["median"]),
        "largest loss": float(ours["final"]["max"]),
        "against the base model": float(ours["vs_base_pct"]),
        "log AUC": float(ours["log_auc"]["median"]),
        "steps to target": float(ours["steps_to_target"]["spread"]["median"]),
        "target reached": -ours["steps_to_target"]["reached"],
        "mean at the same rate": float(found["same_lr"][0]["pct"]["mean"]),
    }


def comparison(root: Path, percent: Sequence[float]) -> list[Path]:
    """AdamW, "sgd" with these differences, and "muon", 0.3 % better; the folders of sgd's headline runs."""
    folders = []
    for method, apart in (("adamw", (0.0,) * 5), ("sgd", percent), ("muon", (-0.3,) * 5)):
        run(root, method, 2e-3, 0, 0.46)
        made = [
            run(root, method, 2e-3, seed, 0.46 * (1 + one / 100)) for seed, one in zip(HEADLINE, apart, strict=True)
        ]
        if method == "sgd":
            folders = [folder.path for folder in made]
    return folders


@pytest.mark.parametrize("percent", DRAWS.values(), ids=DRAWS)
def test_a_seed_that_ends_worse_makes_nothing_look_better(percent: Sequence[float], tmp_path: Path) -> None:
    """The last one, made worse in every way."""
    root = tmp_path / "comparison"
    folders = comparison(root, percent)
    before = figures(root)
    for how in WAYS:
        shutil.copytree(folders[4], tmp_path / "kept")
        spoil(RunFolder(folders[4]), how)
        after = figures(root)
        better = {name: (before[name], after[name]) for name in before if after[name] < before[name] - 1e-9}
        assert not better, f"a seed that ends {how}: {better}"
        shutil.rmtree(folders[4])
        (tmp_path / "kept").rename(folders[4])


@pytest.mark.parametrize("how", WAYS)
def test_a_rate_is_not_chosen_because_a_run_failed_at_it(how: float | str, tmp_path: Path) -> None:
    """Without its third seed, 2e-4 has the lower median."""
    for lr, finals in {2e-3: (0.455, 0.45, 0.45), 2e-4: (0.44, 0.46, 0.47)}.items():
        for seed, final in zip((11, 12, 13), finals, strict=True):
            run(tmp_path, "adamw", lr, seed, final)
    before = compared(tmp_path)["methods"][0]
    assert before["best_lr"] == 2e-3 and before["rates"][0]["score"] == pytest.approx(0.46)
    spoil(RunFolder(tmp_path / "runs" / "adamw" / "lr0.0002" / "seed13"), how)
    after = compared(tmp_path)["methods"][0]
    assert after["best_lr"] == 2e-3 and after["rates"][0]["score"] == pytest.approx(0.46)
    assert after["tuning_seeds"] == [11, 12, 13]


def test_a_finite_loss_above_the_base_models_counts_as_it_is(tmp_path: Path) -> None:
    folders = comparison(tmp_path, (-3.0, -3.2, -2.9, -3.1, -3.0))
    spoil(RunFolder(folders[4]), BASE * 1.1)
    found = compared(tmp_path)
    delta = sgd_of(found)["delta"]
    logs = [math.log(1 + one / 100) for one in (-3.0, -3.2, -2.9, -3.1)] + [math.log(BASE * 1.1 / 0.46)]
    assert delta["pct"]["mean"] == pytest.approx(100 * math.expm1(np.mean(logs))) and delta["pct"]["n"] == 5
    assert delta["ended"] == delta["pct"] and delta["wins"] == 4
    assert "1 of 5 seeds of sgd ended above the base model's loss" in delta["suffixes"]
    assert delta["word"] == "inconclusive" and sgd_of(found)["headline_diverged"] == 0
    assert "1 of 5 seeds ended above the base model's loss: inconclusive" in delta["sentence"]
    assert sgd_of(found)["final"]["max"] == pytest.approx(BASE * 1.1)
    assert "sgd: 1 of 6 runs ended above the base model's loss." in found["warnings"]
    (row,) = (row for row in found["runs"] if row["id"].endswith("sgd/lr0.002/seed5"))
    assert row["status"] == "finished" and row["final"] == pytest.approx(BASE * 1.1)


def test_both_figures_are_told_of_a_method_that_failed_in_a_seed(tmp_path: Path) -> None:
    folders = comparison(tmp_path, (-3.0, -3.2, -2.9, -3.1, -3.0))
    spoil(RunFolder(folders[4]), "failed")
    found = compared(tmp_path)
    method = sgd_of(found)
    delta = method["delta"]
    assert (delta["pct"]["mean"], delta["pct"]["low"], delta["pct"]["n"]) == ("inf", None, 5)
    assert delta["ended"]["mean"] == pytest.approx(-3.05, abs=0.01) and delta["ended"]["n"] == 4
    assert [pair["pct"] for pair in delta["pairs"]][4] == "inf" and delta["wins"] == 4
    assert delta["word"] == "inconclusive" and "1 of 5 seeds of sgd failed" in delta["suffixes"]
    assert delta["sentence"].startswith(
        "sgd: diverged or failed in 1 of 5 seeds, unlike adamw, "
        f"loss {interval(delta['ended'])} against adamw in the other 4"
    )
    assert (method["final"]["max"], method["final"]["n"], method["headline_diverged"]) == ("inf", 5, 1)
    assert method["final"]["median"] == pytest.approx(0.46 * 0.97)
    assert any("sgd/lr0.002/seed5: it was spoilt" in text for text in found["warnings"])
    assert "∞" in table(found)
    json.dumps(found, allow_nan=False)


def test_a_baseline_that_failed_in_a_seed_is_no_better_for_it(tmp_path: Path) -> None:
    comparison(tmp_path, (1.0, 1.2, 1.1, 0.9, 1.0))
    assert sgd_of(compared(tmp_path))["delta"]["word"] == "worse"
    spoil(RunFolder(tmp_path / "runs" / "adamw" / "lr0.002" / "seed5"), "diverged")
    delta = sgd_of(compared(tmp_path))["delta"]
    assert (delta["word"], delta["pct"]["mean"], delta["pairs"][4]["pct"]) == ("inconclusive", "-inf", "-inf")
    assert "adamw diverged or failed in 1 of 5 seeds, unlike sgd" in delta["sentence"]


def test_seeds_in_which_both_failed_tell_nothing(tmp_path: Path) -> None:
    comparison(tmp_path, (1.0, 1.2, 1.1, 0.9, 1.0))
    for method in ("adamw", "sgd"):
        spoil(RunFolder(tmp_path / "runs" / method / "lr0.002" / "seed5"), "diverged")
    delta = sgd_of(compared(tmp_path))["delta"]
    assert (delta["word"], delta["pct"]["n"], delta["pairs"][4]["pct"]) == ("worse", 4, None)


def test_a_run_that_failed_before_it_measured_anything_counts_too(tmp_path: Path) -> None:
    folders = comparison(tmp_path, (-3.0, -3.2, -2.9, -3.1, -3.0))
    RunFolder(folders[0]).metrics_file.unlink()
    spoil(RunFolder(folders[0]), "failed")
    method = sgd_of(compared(tmp_path))
    assert method["delta"]["word"] == "inconclusive" and method["headline_diverged"] == 1


def test_damaged_lines_are_told(tmp_path: Path) -> None:
    folder = RunFolder(comparison(tmp_path, (0.0,) * 5)[0])
    folder.metrics_file.write_text("half\n" + folder.metrics_file.read_text(encoding="utf-8"))
    assert any(f"{folder.metrics_file}: line 1 cannot be read" in text for text in compared(tmp_path)["warnings"])


# The rule itself


def word_of(apart: Sequence[float], broke: Sequence[int]) -> str:
    """Of log ratios: the baseline's losses are 1, or inf where the difference is -inf."""
    theirs = [math.inf if one == -math.inf else 1.0 for one in apart]
    ours = [1.0 if one == -math.inf else math.exp(min(one, 700)) if one < math.inf else one for one in apart]
    return stats.paired_verdict(stats.paired_delta(ours, theirs), broke)


@pytest.mark.parametrize(
    ("apart", "broke", "word"),
    [
        ((-0.03, -0.031, -0.029, -0.03, 0.02), (0, 0, 0, 0, 1), "inconclusive"),
        ((-0.03, -0.031, -0.029, -0.03, 0.02), (0, 0, 0, 0, 0), "inconclusive"),
        ((-0.3, -0.31, -0.29, -0.3, -0.2), (0, 0, 0, 0, 1), "inconclusive"),  # nothing with such a seed is better
        ((0.001, -0.001, 0.0, 0.001, 0.002), (0, 0, 0, 0, 1), "inconclusive"),  # or equivalent
        ((0.01, 0.011, 0.009, 0.01, math.inf), (0, 0, 0, 0, 1), "worse"),
        ((0.01, 0.011, 0.009, 0.01, 5.0), (0, 0, 0, 0, 1), "worse"),
        ((0.01, 0.011, 0.009, 0.01, 5.0), (0, 0, 0, 0, 0), "inconclusive"),  # the interval alone would be of no use
        ((-0.01, math.inf, math.inf, math.inf, math.inf), (0, 1, 1, 1, 1), "worse"),
        ((-0.01, -0.01, math.inf, math.inf, math.inf), (0, 0, 1, 1, 1), "inconclusive"),
        ((math.inf,) * 3, (1,) * 3, "worse"),
        ((math.inf,) * 2, (1,) * 2, "insufficient seeds"),
        ((0.3, 0.4, 3.0), (1, 1, 1), "worse"),
        ((0.01, 0.011, -math.inf, 0.01, math.inf), (0, 0, -1, 0, 1), "inconclusive"),
        ((0.005, 0.05, 0.03, 0.04, 0.0001), (0, 0, 0, 0, 1), "inconclusive"),  # 0.04 in its place would be too much
        ((0.01, 0.011, 0.009, -0.0001, 5.0), (0, 0, 0, -1, 1), "inconclusive"),
        ((-0.01, -0.011, -0.009, -0.01, -math.inf), (0, 0, 0, 0, -1), "better"),
    ],
)
def test_the_word_where_runs_broke_down(apart: tuple[float, ...], broke: tuple[int, ...], word: str) -> None:
    assert word_of(apart, broke) == word
    swapped = {"better": "worse", "worse": "better"}
    assert word_of([-one for one in apart], [-one for one in broke]) == swapped.get(word, word)


def test_breaking_down_never_helps() -> None:
    """Over random draws of five pairs: seed after seed breaks down, a little, much, or for good."""
    rng, words = np.random.default_rng(7), set()
    for _ in range(1000):
        apart = rng.normal(rng.normal(0, 0.02), rng.uniform(0.002, 0.03), 5)
        broke = [0] * 5
        if rng.random() < 0.3:
            apart[4], broke[4] = -rng.uniform(0, 3), -1  # the baseline's
            apart[4] = -math.inf if rng.random() < 0.5 else apart[4]
        standing = STANDING[word_of(apart, broke)]
        for seed in rng.permutation(4):
            apart[seed] = max(apart[seed], 0) + rng.choice([1e-4, 0.1, 3.0, math.inf])
            broke[seed] = 1
            word = word_of(apart, broke)
            assert STANDING[word] <= standing, (apart, broke, word)
            standing = STANDING[word]
            words.add(word)
    assert words == {"worse", "inconclusive"}


@pytest.mark.parametrize(("share", "most"), [(0.0, 0.06), (0.05, 0.07), (0.2, 0.09)])
def test_equal_methods_that_break_down_are_seldom_told_apart(share: float, most: float) -> None:
    """Every run has the same chance to break down; the rest is the noise of the seeds."""
    rng, alarms, draws = np.random.default_rng(3), 0, 2000
    for _ in range(draws):
        ours, theirs = (np.where(rng.random(5) < share, math.inf, np.exp(rng.normal(0, 0.01, 5))) for _ in range(2))
        broke = np.sign(np.isinf(ours).astype(int) - np.isinf(theirs).astype(int)).tolist()
        alarms += stats.paired_verdict(stats.paired_delta(ours.tolist(), theirs.tolist()), broke) in ("better", "worse")
    assert alarms / draws < most
