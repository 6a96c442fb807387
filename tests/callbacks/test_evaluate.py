"""What a measurement of the evaluation loss logs."""

from __future__ import annotations

import numpy as np
import pytest

from dreamlora.callbacks.evaluate import values_of
from dreamlora.eval_loss.items import ItemLosses


def test_a_measurement_is_told_as_means() -> None:
    """``_rel`` is the mean of the items' ratios, in which every time counts alike, not the ratio of the means."""
    losses = ItemLosses("id", np.array([0, 0, 1, 1]), np.array([0.05, 0.1, 0.3, 0.9]))
    losses.put(0, [1.0, 2.0, 4.0, 0.5])
    losses.put(25, [0.5, 1.0, 1.0, 0.5])
    assert values_of(losses, 25, "eval/loss") == {
        "eval/loss": pytest.approx(0.75),
        "eval/loss_rel": pytest.approx((0.5 + 0.5 + 0.25 + 1) / 4),
        "eval/loss_t/0": pytest.approx(0.75),
        "eval/loss_t/2": pytest.approx(1.0),
        "eval/loss_t/7": pytest.approx(0.5),
    }
