"""The evaluation loss as a ``torchmetrics.Metric``, for loops that are not ours.

Apart from ``_eval_loss``, which every training run imports, because torchmetrics takes a while to import.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dreamlora.eval_loss.evalset import item_losses
from dreamlora.metrics._stateful import EmbeddingMetric


class EvalLoss(EmbeddingMetric):
    """Mean over items of their mean squared errors; ``losses`` keeps those of the items."""

    SIDES = ("losses",)
    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(1, **kwargs)

    def update(self, prediction: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add items: two ``[n, ...]``."""
        super().update(losses=item_losses(prediction, target)[:, None])

    def compute(self) -> Tensor:
        """``()``: the mean, over the items of all processes."""
        return self.rows("losses").double().mean()
