"""The gradients of all processes become one: data parallelism for a LoRA, in one message per optimizer step.

DDP reduces while the backward pass is under way, which is worth it for whole models. It also counts on every process
making the same forward passes, over all parameters: a micro-batch of several image sizes, or a layer that the
prediction does not depend on, stops it. A LoRA is a few megabytes: it is averaged once, after the last backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the mean over all processes of each gradient; one that is missing counts as zero.

    A parameter whose gradient is missing everywhere keeps ``None``, so that no optimizer moves or decays it.

    Args:
        parameters: the same in every process, on one device and in one precision.
    """
    if accelerator.num_processes == 1:
        return
    missing = [number for number, parameter in enumerate(parameters) if parameter.grad is None]
    given = torch.ones(len(parameters), device=accelerator.device)
    for number in missing:
        given[number] = 0.0
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    message = torch.cat([given, *(gradient.flatten() for gradient in own)])
    shares, *means = accelerator.reduce(message, "mean").split([len(parameters), *(p.numel() for p in parameters)])
    for gradient, mean in zip(own, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    elsewhere = (shares > 0).tolist() if missing else []  # waits for the device, but only where a gradient is missing
    for number in missing:
        if elsewhere[number]:
            parameters[number].grad = own[number]
