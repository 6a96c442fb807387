"""The evaluation loss as a ``torchmetrics.Metric``; apart from its users: importing torchmetrics takes 0.4 s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamlora.metrics._gathered import GatheredRows


class EvalLoss(GatheredRows):
    """The losses of evaluation items, whichever process measured them: their mean is the evaluation loss."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__({"losses": torch.zeros(0)}, **kwargs)

    def update(self, items: Tensor, prediction: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add items: their numbers ``[n]`` int64, and two ``[n, ...]``."""
        super().update(items, losses=item_losses(prediction, target))

    def compute(self) -> Tensor:
        """``[items]`` float32 of all processes, by the numbers of the items."""
        return self.rows("losses")


def item_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every item: two ``[n, ...]`` of any precision give ``[n]`` float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
