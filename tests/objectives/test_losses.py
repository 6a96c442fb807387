"""Errors of samples: masks, and losses that are not squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamlora.config import Train
from dreamlora.objectives import TrainingLoss, squared_errors, training_loss


def at(way: float, signal: float) -> tuple[Tensor, Tensor]:
    """Share of the way to noise, and of the signal, of one sample."""
    return torch.tensor([way]), torch.tensor([signal])


def never() -> tuple[Tensor, Tensor]:
    raise AssertionError("this loss does not go by times")


def left_and_right() -> tuple[Tensor, Tensor, Tensor]:
    """Predictions, targets with an error of 2 on the left and 1 on the right, and masks that are white on the left."""
    prediction, target, masks = torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    target[..., :2], masks[..., :2] = 2.0, 1.0
    return prediction, target, masks


def test_errors_count_where_the_mask_is_white():
    prediction, target = torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    target[:, :, :, :2] = 2.0  # an error of 4 on the left, none on the right
    left, both, none = torch.zeros(1, 4, 4), torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    left[:, :, :2] = 1.0
    masks = torch.stack([left, both, none])
    assert squared_errors(prediction, target, masks).tolist() == [4.0, 2.0, 0.0]
    assert squared_errors(prediction, target).tolist() == [2.0, 2.0, 2.0]
    grey = torch.full((3, 1, 4, 4), 0.5)  # what matters is the share of a place, not how bright the mask is
    assert squared_errors(prediction, target, grey).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("unmasked", "expected"),
    [(0.0, 4.0), (0.25, (4 + 0.25) / 1.25), (1.0, 2.5)],
    ids=["left alone", "a quarter", "as without"],
)
def test_what_a_mask_leaves_out_keeps_the_unmasked_weight(unmasked: float, expected: float) -> None:
    prediction, target, masks = left_and_right()
    found = TrainingLoss(unmasked_weight=unmasked).errors(prediction, target, masks, never)
    assert found.item() == pytest.approx(expected)
    assert TrainingLoss(unmasked_weight=unmasked).errors(prediction, target, None, never).item() == 2.5


def test_grey_places_keep_what_the_mask_says_if_that_is_more() -> None:
    """OneTrainer's rule: the mask, but at least the weight."""
    prediction, target, masks = left_and_right()
    masks[..., 2:] = 0.5
    found = TrainingLoss(unmasked_weight=0.25).errors(prediction, target, masks, never)
    assert found.item() == pytest.approx((4 + 0.5) / 1.5)


def test_l1_is_the_mean_of_absolute_differences() -> None:
    prediction, target, masks = left_and_right()
    assert TrainingLoss("l1").errors(prediction, -target, None, never).item() == 1.5
    assert TrainingLoss("l1").errors(prediction, target, masks, never).item() == 2.0


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_small_differences_are_not_lost_in_rounding(loss_type: str) -> None:
    """√(d² + δ²) - δ as it is written has no digit left here."""
    d, delta = np.float64(1e-4), np.float64(1.0)
    exact = 2 * (np.sqrt(d**2 + delta**2) - delta)
    prediction = torch.full((1, 1, 2, 2), float(d))
    loss = TrainingLoss(loss_type, "constant", 1.0)
    found = loss.errors(prediction, torch.zeros_like(prediction), None, lambda: at(0.5, 0.5))
    assert found.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("schedule", ["snr", "exponential", "constant"])
def test_huber_is_the_square_near_the_target_and_straight_far_off(schedule: str) -> None:
    loss = TrainingLoss("huber", schedule, 0.1)

    def error(difference: float) -> float:
        prediction = torch.full((1, 1, 1, 1), difference)
        return loss.errors(prediction, torch.zeros_like(prediction), None, lambda: at(0.3, 0.6)).item()

    assert error(1e-3) == pytest.approx(1e-6, rel=1e-3)
    assert error(2000.0) / error(1000.0) == pytest.approx(2, rel=1e-2)
    assert error(-3.0) == error(3.0)


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber", "smooth_l1"])
def test_nothing_is_wrong_with_what_is_right(loss_type: str) -> None:
    """Neither the error nor its gradient: 0/0 would make the run's weights NaN."""
    prediction = torch.zeros(1, 1, 2, 2, requires_grad=True)
    error = TrainingLoss(loss_type).errors(prediction, torch.zeros(1, 1, 2, 2), None, lambda: at(1.0, 0.0))
    error.sum().backward()
    assert error.item() == 0 and prediction.grad is not None and not prediction.grad.any()


def test_halves_are_counted_in_full_precision() -> None:
    prediction = torch.full((1, 1, 1, 1), 300.0, dtype=torch.float16)
    for loss_type in ("l2", "l1", "huber", "smooth_l1"):
        error = TrainingLoss(loss_type).errors(prediction, torch.zeros_like(prediction), None, lambda: at(0.5, 0.5))
        assert error.dtype == torch.float32 and error.isfinite().all()


def test_the_loss_is_as_the_options_say() -> None:
    options = {"loss_type": "huber", "huber_schedule": "exponential", "huber_c": 0.3, "huber_scale": 2.0}
    assert training_loss(Train(**options, unmasked_weight=0.5)) == TrainingLoss("huber", "exponential", 0.3, 2.0, 0.5)
    assert training_loss(Train()) == TrainingLoss()
