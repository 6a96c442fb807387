"""The evaluation loss as a metric is the mean squared error of every item."""

from __future__ import annotations

import pytest
import torch

from dreamlora.eval_loss.metric import EvalLoss


def test_it_keeps_the_items_squared_errors_in_their_order() -> None:
    prediction, target = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    metric = EvalLoss()
    metric.update(torch.tensor([4, 1]), prediction[[4, 1]].bfloat16(), target[[4, 1]].bfloat16())
    metric.update(torch.tensor([0, 2, 3]), prediction[[0, 2, 3]], target[[0, 2, 3]])
    for item, loss in enumerate(metric.compute().tolist()):
        pair = [side[item].bfloat16().float() if item in (4, 1) else side[item] for side in (prediction, target)]
        assert loss == pytest.approx(float((pair[0] - pair[1]).square().mean()), rel=1e-6)


def test_losses_that_are_not_finite_are_kept() -> None:
    metric = EvalLoss()
    metric.update(torch.arange(3), torch.tensor([[float("nan")], [float("inf")], [1.0]]), torch.zeros(3, 1))
    assert str(metric.compute().tolist()) == "[nan, inf, 1.0]"
