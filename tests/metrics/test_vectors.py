"""The metrics made of cosines, each against sums written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dreamlora.interfaces import MetricInputs
from dreamlora.metrics import clip_i, clip_score, cmmd, copy, dino, diversity, drift, fid, kid
from dreamlora.metrics._similarity import image_similarity

Rows = Callable[..., Tensor]


def cosine(x: Tensor, y: Tensor) -> float:
    a, b = x.tolist(), y.tolist()
    return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture
def inputs(rows: Rows) -> MetricInputs:
    """Six images of three prompts; the last prompt is without the subject."""
    return MetricInputs(
        generated=rows(6, 6, 1),
        groups=torch.tensor([0, 0, 1, 1, 1, 2]),
        with_subject=torch.tensor([True, True, True, True, True, False]),
        prompts=rows(6, 6, 2),
        references=rows(4, 6, 3),
        training=rows(5, 6, 4),
        base=rows(6, 6, 5),
    )


def test_clip_score_is_the_mean_cosine_of_pairs(inputs: MetricInputs) -> None:
    found = clip_score.compute(inputs)
    assert inputs.prompts is not None
    expected = mean([cosine(x, t) for x, t in zip(inputs.generated, inputs.prompts, strict=True)])
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert (found.n, found.n_other) == (6, None)


def test_it_is_neither_scaled_nor_cut_off(rows: Rows) -> None:
    x = rows(3)
    assert clip_score.clip_score(x, 2 * x) == pytest.approx(1)
    assert clip_score.clip_score(x, -x) == pytest.approx(-1)


@pytest.mark.parametrize("metric", [clip_i, dino], ids=["clip_i", "dino"])
def test_similarity_is_the_mean_over_images_of_the_subject_and_references(metric: object, inputs: MetricInputs) -> None:
    found = metric.compute(inputs)
    assert inputs.references is not None
    expected = mean([cosine(x, r) for x in inputs.generated[:5] for r in inputs.references])
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert (found.n, found.n_other) == (5, 4)


@pytest.mark.parametrize("metric", [clip_i, cmmd, copy, dino, fid, kid], ids=lambda metric: metric.NAME)
def test_without_an_image_of_the_subject_there_is_no_comparison(metric: ModuleType, inputs: MetricInputs) -> None:
    with pytest.raises(ValueError, match="no image has a prompt that names the subject"):
        metric.compute(replace(inputs, with_subject=torch.zeros(6, dtype=torch.bool)))


def test_an_image_is_not_compared_with_itself(rows: Rows) -> None:
    x = rows(3)
    expected = mean([cosine(x[i], x[j]) for i in range(3) for j in range(3) if i != j])
    assert image_similarity(x, x) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="differ from the references"):
        image_similarity(x[:1], x[:1])


def test_diversity_is_over_different_images_of_one_prompt(inputs: MetricInputs) -> None:
    x = inputs.generated
    second = [cosine(x[i], x[j]) for i in (2, 3, 4) for j in (2, 3, 4) if i != j]
    found = diversity.compute(inputs)
    assert found.value == pytest.approx(1 - mean([cosine(x[0], x[1]), mean(second)]), abs=1e-5)
    assert found.n == 5
    assert diversity.diversity(x[:1].repeat(3, 1), torch.zeros(3)) == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="--num_images_per_prompt"):
        diversity.diversity(x, torch.arange(6))


def test_copy_is_the_nearest_training_image_against_that_of_unseen_photos(inputs: MetricInputs) -> None:
    assert inputs.training is not None and inputs.references is not None

    def nearest(images: Tensor) -> float:
        assert inputs.training is not None
        return mean([max(cosine(x, t) for t in inputs.training) for x in images])

    found = copy.compute(inputs)
    expected = nearest(inputs.generated[:5]) - nearest(inputs.references)
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert (found.n, found.n_other) == (5, 5)
    assert copy.copy_score(inputs.training, inputs.training, inputs.references) > 0
    assert copy.copy_score(inputs.references, inputs.training, inputs.references) == 0


def test_drift_is_on_prompts_without_the_subject(inputs: MetricInputs) -> None:
    assert inputs.base is not None
    found = drift.compute(inputs)
    assert found.value == pytest.approx(1 - cosine(inputs.generated[5], inputs.base[5]), abs=1e-5)
    assert found.n == 1
    everywhere = MetricInputs(inputs.generated, inputs.groups, torch.ones(6, dtype=torch.bool), base=inputs.base)
    with pytest.raises(ValueError, match="class prompt"):
        drift.compute(everywhere)


@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf")])
def test_vectors_without_direction_are_refused(wrong: float, rows: Rows) -> None:
    x = rows(3)
    x[1] = wrong
    with pytest.raises(ValueError, match="row 1 is zero or not finite"):
        clip_score.clip_score(x, rows(3))
    with pytest.raises(ValueError, match="row 1 is zero or not finite"):
        image_similarity(rows(3), x)


def test_no_image_is_refused(rows: Rows) -> None:
    with pytest.raises(ValueError, match=r"clip_score needs at least 1 image \(got 0\)"):
        clip_score.clip_score(rows(0), rows(0))
    with pytest.raises(ValueError, match="rows must pair up"):
        clip_score.clip_score(rows(2), rows(3))


def test_one_image_is_enough_for_means(rows: Rows) -> None:
    assert -1 <= clip_score.clip_score(rows(1), rows(1, 6, 2)) <= 1
    assert -1 <= image_similarity(rows(1), rows(1, 6, 2)) <= 1
