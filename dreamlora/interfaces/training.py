"""What a training exchanges: conditioning, batches, results of steps; and what an objective and a callback are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:  # plug-ins import this module, and what they say of themselves is read without torch
    from torch import Tensor

Conditioning: TypeAlias = "dict[str, Tensor]"
"""What a family's denoiser is told besides the noisy latents: tensors by name, batch first.

Of a prompt, and of an image's view (``Family.describe_views``); that of one prompt or image has a leading 1. Tensors
whose length is the prompt's own are named in ``Family.LENGTH_AXES``: they are kept without padding, and a batch of them
is padded with zeros to its longest."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        latents: ``[B, C, h, w]`` float32, drawn from the posterior.
        noise: ``[B, C, h, w]`` float32.
        times: ``[B]``: integer time steps (diffusion) or sigmas in (0, 1) (flow).
        conditioning: prompt embeddings, or token ids while the text encoder trains; and what belongs to the images.
        weights: ``[B]`` float32: the loss is ``sum(weights * per_sample_loss)``.
        names: file of every sample, for error messages.
        masks: ``[B, 1, h, w]`` float32 in [0, 1], how much of the loss every place has; None: the same everywhere.
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    conditioning: Conditioning
    weights: Tensor
    names: tuple[str, ...]
    masks: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    Attributes:
        step: number of the step just done, from 1.
        loss: mean training loss over the step's micro-batches and processes.
        grad_norm: norm of the gradients before clipping, in the optimizer's units; not finite in a step that fp16
            skipped.
        learning_rate: of the first parameter group.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were, since the loss was scaled up too far for fp16."""
        return not math.isfinite(self.grad_norm)


class Objective(Protocol):
    """A training objective: pure functions of latents ``[B, C, h, w]``, noise (same shape) and times ``[B]``."""

    def draw_times(self, uniforms: Tensor, sides: tuple[int, int]) -> Tensor:
        """Training times from numbers ``[B, 2]`` uniform in (0, 1), for latents of these sides (h, w): the more there
        is to see, the more noise it takes to hide it.
        """

    def spread_times(self, positions: Tensor) -> Tensor:
        """Evaluation times at positions ``[n]`` in (0, 1), uniform whatever the training density."""

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noisy latents the denoiser sees."""

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should predict."""

    def weight(self, times: Tensor) -> Tensor:
        """Loss weight ``[B]`` of every sample."""

    def errors(self, prediction: Tensor, target: Tensor, times: Tensor, masks: Tensor | None = None) -> Tensor:
        """What training makes small: the error ``[B]`` of every prediction, in float32; where there are masks
        ``[B, 1, h, w]`` in [0, 1], weighted by them.
        """


class Callback(Protocol):
    """Something that happens at times during training; ``run`` is ``training.loop.Run``."""

    def on_start(self, run: Any) -> None:
        """Before the first step (or the first after a resume)."""

    def on_step(self, run: Any, result: StepResult) -> None:
        """After every optimizer step."""

    def on_end(self, run: Any) -> None:
        """After the last step."""
