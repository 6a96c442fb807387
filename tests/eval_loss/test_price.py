"""What the evaluation may cost, and never less than a verdict needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dreamlora.eval_loss.evalset import build_eval_set, build_final_set
from dreamlora.eval_loss.price import (
    FINAL_SIZES,
    LARGEST_SHARE,
    LEAST_OCCASIONS,
    MOST_OCCASIONS,
    Workload,
    affordable,
)
from dreamlora.objectives import RectifiedFlow

LEAST_EVERY = 25
FLUX_RECIPE = Workload(steps=800, samples_per_step=4, images=5, gap_images=0, checkpointing=True)
"""README's, with five photos, none of which is held out."""
LONG = Workload(steps=20_000, samples_per_step=16, images=8, gap_images=16, checkpointing=False)


def test_what_was_the_default_took_a_quarter_of_the_flux_recipe() -> None:
    assert FLUX_RECIPE.training == 800 * 4 * 3
    assert FLUX_RECIPE.price(40, 256).share == pytest.approx(0.225, abs=0.01)


@pytest.mark.parametrize("images", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("gap_images", [0, 16])
@pytest.mark.parametrize("steps", [400, 800, 1500, 4000])
@pytest.mark.parametrize("samples", [4, 8, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_tenth_at_most_or_the_least_that_a_verdict_needs(
    images: int, gap_images: int, steps: int, samples: int, checkpointing: bool, averaged: bool
) -> None:
    work = Workload(steps, samples, images, gap_images, checkpointing, averaged)
    every, final_items = affordable(work, None, None, LEAST_EVERY)
    price, least = work.price(every, final_items), work.price(-(-steps // LEAST_OCCASIONS), FINAL_SIZES[-1])
    assert price.forwards >= least.forwards
    assert price.share <= LARGEST_SHARE or price == least
    assert LEAST_OCCASIONS < price.occasions <= MOST_OCCASIONS + 1


def test_the_flux_recipe_keeps_within_a_tenth_and_a_long_run_measures_all() -> None:
    assert affordable(FLUX_RECIPE, None, None, LEAST_EVERY) == (115, 128)
    assert FLUX_RECIPE.price(115, 128).share <= LARGEST_SHARE
    assert affordable(LONG, None, None, LEAST_EVERY) == (20_000 // MOST_OCCASIONS, FINAL_SIZES[0])


def test_what_is_given_stands_and_the_rest_is_scaled() -> None:
    assert affordable(FLUX_RECIPE, 10, None, LEAST_EVERY)[0] == 10
    assert affordable(FLUX_RECIPE, None, 512, LEAST_EVERY)[1] == 512
    assert affordable(FLUX_RECIPE, None, 0, LEAST_EVERY)[0] < affordable(FLUX_RECIPE, None, 128, LEAST_EVERY)[0]
    assert affordable(FLUX_RECIPE, 0, 0, LEAST_EVERY) == (0, 0)
    assert FLUX_RECIPE.price(0, 256).forwards == 0


def test_a_short_run_is_measured_all_the_same() -> None:
    short = replace(FLUX_RECIPE, steps=10)
    every, final_items = affordable(short, None, None, LEAST_EVERY)
    assert (every, final_items) == (LEAST_EVERY, FINAL_SIZES[-1])
    assert short.price(every, final_items).occasions == 2  # base model and last step


@pytest.mark.parametrize("images", [1, 3, 8, 16])
@pytest.mark.parametrize("items", [10, 64, 128, 256])
def test_the_price_counts_the_items_that_the_sets_have(images: int, items: int) -> None:
    flow = RectifiedFlow(torch.linspace(1, 0.001, 100))
    latents, names = torch.zeros(images, 1, 2, 2), [str(number) for number in range(images)]
    curve = build_eval_set(latents, names, names, flow, seed=0, model_id="")
    final = build_final_set(curve, names, flow, seed=0, n_items=items)
    price = replace(FLUX_RECIPE, images=images, gap_images=images).price(100, items)
    assert (price.curve_items, price.gap_items) == (len(curve.times), len(curve.times))
    assert price.final_items == len(final.times) >= items or items < 4 * images
    assert price.occasions == 9
    assert price.forwards == 9 * len(curve.times) + 3 * (len(final.times) + len(curve.times))
    assert f"{price.forwards:,} forward passes" in str(price)


def test_with_a_moving_average_all_but_the_base_model_is_measured_twice() -> None:
    averaged = replace(LONG, averaged=True)
    plain, price = LONG.price(1000, 256), averaged.price(1000, 256)
    assert price.forwards == plain.forwards + 20 * plain.curve_items
    assert "21 times (and 20 times without the moving average) on 64 items and 3 times on" in str(price)
    assert "moving average" not in str(plain)
    assert affordable(replace(FLUX_RECIPE, averaged=True), None, None, LEAST_EVERY)[0] > 115
