"""Selection and early stopping on made-up losses, where it is known what is better."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from dreamlora.eval_loss.items import ItemLosses
from dreamlora.eval_loss.selection import candidates, select, stalled

ITEMS = 64
LEVEL = np.random.default_rng(0).lognormal(-2, 1.2, ITEMS)
"""Losses of the items: they differ from time to time by much more than from step to step."""


def table(means: Mapping[int, float], spread: float = 0.0, level: np.ndarray = LEVEL) -> ItemLosses:
    """Losses whose paired differences have exactly these means, and a standard deviation of ``spread`` and more."""
    losses = ItemLosses("id", np.repeat(range(8), 8), np.linspace(0.01, 0.99, ITEMS))
    for number, (step, mean) in enumerate(means.items()):
        noise = np.random.default_rng(number + 1).normal(size=ITEMS)
        noise = (noise - noise.mean()) / noise.std(ddof=1)
        losses.put(step, (level - level.mean() + mean + spread * noise).tolist())
    return losses


def test_the_lowest_wins_where_differences_are_clear() -> None:
    found = select(table({0: 0.5, 50: 0.4, 100: 0.3, 150: 0.35}, spread=0.01), "eval/loss")
    assert found is not None and found.step == 100
    facts = found.facts
    assert (facts["runner_up"]["step"], facts["last"]["step"], facts["lowest"]["difference"]) == (150, 150, 0)
    assert facts["runner_up"]["difference"] == pytest.approx(0.05, rel=1e-4)
    apart = facts["runner_up"]["difference"] / facts["runner_up"]["standard_error"]
    assert facts["runner_up"]["standard_errors"] == pytest.approx(apart) and apart > 20
    assert "Best: step 100, because it has the lowest loss (eval/loss 0.3000 on 64 items)." in found.reason
    assert f"The runner-up, step 150 with 0.3500, is 0.05 ({apart:.1f} paired standard errors) higher." in found.reason
    assert "The base model has 0.5000: the loss fell by 40.0 %." in found.reason
    json.dumps(facts, allow_nan=False)


def test_within_one_standard_error_the_earliest_wins() -> None:
    """Differences of two steps have a standard error of about 0.1 sqrt(2) / 8 = 0.018."""
    found = select(table({0: 0.5, 50: 0.4, 100: 0.305, 150: 0.300, 200: 0.31}, spread=0.1), "eval/loss")
    assert found is not None and found.step == 100
    assert found.facts["runner_up"]["step"] == found.facts["lowest"]["step"] == 150
    assert "is the earliest whose loss (eval/loss 0.3050 on 64 items) cannot be told from the lowest" in found.reason
    assert "(0.3 paired standard errors) lower" in found.reason


def apart_by(errors: float) -> ItemLosses:
    """Step 50 lies above step 100 by so many paired standard errors."""
    losses = table({0: 0.9, 100: 0.5})
    noise = np.random.default_rng(0).normal(size=ITEMS)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    losses.put(50, (losses.rows[100] + 0.01 * (errors + math.sqrt(ITEMS) * noise)).tolist())
    return losses


@pytest.mark.parametrize(("errors", "earlier"), [(0.5, True), (0.95, True), (1.05, False), (2.0, False)])
def test_one_standard_error_is_the_limit(errors: float, earlier: bool) -> None:
    losses = apart_by(errors)
    assert losses.difference(50, 100).standard_errors == pytest.approx(errors, rel=1e-3)
    found = select(losses, "eval/loss")
    assert found is not None and found.step == (50 if earlier else 100)
    losses.rows = {0: losses.rows[50], 50: losses.rows[100]}
    assert (stalled(losses, 1) is not None) == earlier, "no clear improvement"


def test_the_noise_of_the_times_does_not_enter() -> None:
    """Without pairing the standard error would be 30 times as large as the difference."""
    assert LEVEL.std() / 8 > 30 * 0.001
    found = select(table({0: 0.5, 50: 0.401, 100: 0.4}, spread=0.0), "eval/loss")
    assert found is not None and found.step == 100


def test_few_steps_are_candidates_and_they_are_those_that_matter() -> None:
    means = {0: 0.5, 25: 0.45, 50: 0.302, 75: 0.31, 100: 0.301, 125: 0.3}
    losses = table(means, spread=0.1)
    assert candidates(losses) == [50, 100, 125], "75 comes after a better one, 25 is clearly worse"
    assert candidates(losses, until=60) == [50]
    assert candidates(losses, until=100) == [50, 100]
    assert candidates(losses, lost={50}) == [75, 100, 125]


def test_the_base_model_is_never_the_best_but_the_reason_says_if_it_is_better() -> None:
    found = select(table({0: 0.3, 50: 0.4, 100: 0.5}), "eval/loss")
    assert found is not None and found.step == 50
    assert "The base model has 0.3000, which is lower: by this measure the training did not help." in found.reason
    same = select(table({0: 0.3, 50: 0.299}, spread=0.1), "eval/loss")
    assert same is not None and "no higher than noise explains" in same.reason
    assert select(table({0: 0.3}), "eval/loss") is None


def test_losses_that_are_not_finite_never_win() -> None:
    losses = table({0: 0.5, 50: 0.4, 100: math.nan, 150: math.inf})
    found = select(losses, "eval/loss")
    assert found is not None and found.step == 50
    json.dumps(found.facts, allow_nan=False)


def test_vetoes() -> None:
    losses = table({0: 0.5, 50: 0.4, 100: 0.3})
    found = select(losses, "eval/loss", {100: "prompts are ignored"})
    assert found is not None and found.step == 50
    assert "Refused: step 100 (prompts are ignored)." in found.reason
    assert found.facts["vetoed"] == {"100": "prompts are ignored"}
    assert "because it has the lowest loss of those that are not refused (eval/loss 0.4000" in found.reason
    assert found.facts["runner_up"] is None and "No other step could be taken." in found.reason
    three = select(table({0: 0.5, 50: 0.4, 100: 0.3, 150: 0.45}), "eval/loss", {100: "prompts are ignored"})
    assert three is not None and "The runner-up, step 150 with 0.4500, is 0.05" in three.reason
    worse = select(table({0: 0.5, 50: 0.4, 100: 0.45}), "eval/loss", {100: "prompts are ignored"})
    assert worse is not None and "because it has the lowest loss (eval/loss" in worse.reason
    all_vetoed = select(losses, "eval/loss", {50: "a", 100: "b"})
    assert all_vetoed is not None and all_vetoed.step == 100
    assert all_vetoed.facts["vetoes_passed_over"] and "so the loss alone decided" in all_vetoed.reason


def test_training_images_are_named_as_what_they_are() -> None:
    found = select(table({0: 0.5, 50: 0.4}), "eval/loss_train")
    assert found is not None and "cannot see overfitting" in found.reason


def curve(means: Sequence[float], spread: float = 0.0) -> ItemLosses:
    return table({25 * number: mean for number, mean in enumerate(means)}, spread)


def test_a_run_that_gets_better_goes_on_however_noisy_the_items() -> None:
    assert stalled(curve([0.5 - 0.001 * step for step in range(20)]), 3) is None


def test_slow_progress_adds_up() -> None:
    """No step is clearly better than the one before (0.25 standard errors), but the sixth is better than the first."""
    means = [0.5 - 0.0045 * step for step in range(20)]
    known = [curve(means[:count], spread=0.1) for count in range(1, 21)]
    assert not any(stalled(losses, 6) for losses in known)
    assert any(stalled(losses, 2) for losses in known)


def test_one_bad_measurement_does_not_stop_a_run() -> None:
    assert stalled(curve([0.5, 0.4, 0.3, 0.45, 0.45, 0.29]), 3) is None


@pytest.mark.parametrize("then", [[0.31, 0.32, 0.33], [0.3, 0.3, 0.3], [0.2999, 0.3001, 0.2998]])
def test_overfitting_and_standing_still_stop_it(then: list[float]) -> None:
    losses = curve([0.5, 0.4, 0.3, *then], spread=0.01)
    assert stalled(losses, 4) is None
    found = stalled(losses, 3)
    assert found is not None
    assert (found.step, found.waited) == (50, 3)
    assert found.apart.mean == pytest.approx(then[-1] - 0.3, abs=1e-6)


def test_nothing_measured_is_no_reason_to_stop() -> None:
    assert stalled(curve([]), 1) is None
    assert stalled(curve([0.5]), 1) is None


def test_diverging_is_a_reason() -> None:
    assert stalled(curve([0.5, 0.4, math.nan, math.nan]), 2) is not None
