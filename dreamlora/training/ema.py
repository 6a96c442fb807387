"""The moving average of what trains: seen by whoever looks at a run, unknown to its optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of parameters over optimizer steps, one by one: of A and of B, not of B·A.

    The parameters hold the trained weights in ``train`` mode and the average in ``eval`` mode, as those of
    schedule-free optimizers do; but the switch copies and does not round, so the trained weights come back to the last
    bit. Takes twice the memory of the parameters.

    Args:
        parameters: by name; their values count when they are first put into ``train`` mode.
        decay: share of the average that a step leaves, once it has warmed up, in (0, 1).

    Attributes:
        shown: whether the parameters hold the average.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._names = list(parameters)
        self._parameters: list[Tensor] = list(parameters.values())
        self._decay = decay
        self._average: list[Tensor] = []
        self._trained: list[Tensor] = []
        self.shown = False

    @torch.no_grad()
    def train(self) -> None:
        """Put the trained weights into the parameters, from where the optimizer goes on."""
        if not self._average:
            self._begin()
        if self.shown:
            torch._foreach_copy_(self._parameters, self._trained)
            self.shown = False

    @torch.no_grad()
    def eval(self) -> None:
        """Put the average into the parameters, which is what to measure, draw and save."""
        if self._average and not self.shown:
            torch._foreach_copy_(self._trained, self._parameters)
            torch._foreach_copy_(self._parameters, self._average)
            self.shown = True

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take the weights of an optimizer step into the average, in ``train`` mode.

        Args:
            number: of the steps that were made, this one included; those that fp16 skips are none.
        """
        torch._foreach_lerp_(self._average, self._parameters, 1 - decay_of(number, self._decay))

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """The parameters hold the trained weights in here, and the average again afterwards."""
        self.train()
        try:
            yield
        finally:
            self.eval()

    def hidden(self) -> dict[str, Tensor]:
        """In ``eval`` mode, or before the first step: the trained weights by name."""
        weights = self._trained if self.shown else [parameter.detach() for parameter in self._parameters]
        return dict(zip(self._names, weights, strict=True))

    @torch.no_grad()
    def take_up(self, trained: Mapping[str, Tensor]) -> None:
        """Go on, in ``eval`` mode, from the average that the parameters hold, and from what ``hidden`` gave with it."""
        self._begin()
        for there, name in zip(self._trained, self._names, strict=True):
            there.copy_(trained[name])
        self.shown = True

    def _begin(self) -> None:
        self._average, self._trained = (
            [parameter.detach().clone() for parameter in self._parameters] for _ in ("average", "trained")
        )


def decay_of(number: int, decay: float) -> float:
    """Share of the average that step ``number`` (from 1) leaves: nothing of the start, then ``n / (n + 9)`` up to
    ``decay``: an average over about the last tenth of the steps until then. As in diffusers' ``EMAModel``.
    """
    return min(decay, number / (number + 9)) if number > 1 else 0.0
