"""The evaluation loss as a ``torchmetrics.Metric``; apart from its users: importing torchmetrics takes 0.4 s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamlora.metrics._gathered import GatheredRows
from dreamlora.objectives import squared_errors


class EvalLoss(GatheredRows):
    """The losses of evaluation items, whichever process measured them: their mean is the evaluation loss."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__({"losses": torch.zeros(0)}, **kwargs)

    def update(  # type: ignore[override]
        self, items: Tensor, prediction: Tensor, target: Tensor, masks: Tensor | None = None
    ) -> None:
        """Add items: their numbers ``[n]`` int64, and what ``squared_errors`` takes."""
        super().update(items, losses=squared_errors(prediction, target, masks))

    def compute(self) -> Tensor:
        """``[items]`` float32 of all processes, by the numbers of the items."""
        return self.rows("losses")
