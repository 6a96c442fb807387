"""How far a prediction is from its target, one number for every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]


def squared_errors(prediction: Tensor, target: Tensor, masks: Tensor | None = None) -> Tensor:
    """Mean squared error of every sample, in float32: two ``[B, C, h, w]`` of any precision give ``[B]``.

    Args:
        masks: ``[B, 1, h, w]`` in [0, 1]: the mean is weighted by it, so that a small subject counts as much as a large
            one. A sample whose mask is black has no error: there is nothing to learn of it.
    """
    return _mean((prediction.float() - target.float()).square(), masks)


def _mean(values: Tensor, masks: Tensor | None) -> Tensor:
    if masks is None:
        return values.flatten(1).mean(1)
    return (values.mean(1, keepdim=True) * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1e-6)


@dataclass(frozen=True)
class TrainingLoss:
    """The error that is trained on; what evaluates always takes ``squared_errors``.

    Huber's losses (here pseudo-Huber, as in kohya's sd-scripts) are quadratic for differences d well below a threshold
    δ and linear above, so that single places far off do not rule: ``2 δ (√(d² + δ²) - δ)`` is "huber", which is d² for
    small d; "smooth_l1" is the same without the factor δ, so 2 |d| for large d.

    Attributes:
        loss_type: "l2" is the squared difference, "l1" the absolute one.
        huber_schedule: δ at a time that is a share t of the way from image to noise: "constant" c s, "exponential" cᵗ s
            (s for clear images, c s for noise), "snr" ``(1 - c) a² + c`` with a = signal / (signal + noise).
        huber_c: c.
        huber_scale: s.
        unmasked_weight: how much of the loss the places keep that a mask leaves out (OneTrainer's "unmasked weight").
    """

    loss_type: LossType = "l2"
    huber_schedule: HuberSchedule = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    unmasked_weight: float = 0.0

    def errors(
        self, prediction: Tensor, target: Tensor, masks: Tensor | None, noisiness: Callable[[], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Of every sample ``[B]``, float32.

        Args:
            prediction: ``[B, C, h, w]`` of any precision, as ``target``.
            target: what was to be predicted.
            masks: see ``squared_errors``.
            noisiness: gives t and a of every sample, ``[B]`` each; asked only by losses that go by them.
        """
        if masks is not None:
            masks = masks.clamp(min=self.unmasked_weight)
        if self.loss_type == "l2":
            return squared_errors(prediction, target, masks)
        difference = prediction.float() - target.float()
        if self.loss_type == "l1":
            return _mean(difference.abs(), masks)
        delta = self._threshold(*noisiness()).float().reshape(-1, *[1] * (difference.dim() - 1))
        squares = difference.square()
        # √(d² + δ²) - δ without the difference of two large numbers
        values = 2 * squares / ((squares + delta.square()).sqrt() + delta)
        return _mean(values * delta if self.loss_type == "huber" else values, masks)

    def _threshold(self, way: Tensor, signal: Tensor) -> Tensor:
        """δ ``[B]``."""
        if self.huber_schedule == "constant":
            return torch.full_like(way, self.huber_c * self.huber_scale)
        if self.huber_schedule == "exponential":
            return self.huber_c**way * self.huber_scale
        return (1 - self.huber_c) * signal.square() + self.huber_c


def training_loss(train: Any) -> TrainingLoss:
    """What the options say (``config.Train``)."""
    return TrainingLoss(
        loss_type=train.loss_type,
        huber_schedule=train.huber_schedule,
        huber_c=train.huber_c,
        huber_scale=train.huber_scale,
        unmasked_weight=train.unmasked_weight,
    )
