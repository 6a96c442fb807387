"""The start of the LoRA: an init of ``inits/`` is asked for A and B of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.inits._start import Probe, Target
from dreamlora.lora.pairs import ADAPTER, adapted_layers, tuned_layers
from dreamlora.processes import wait_for_everyone
from dreamlora.randomness import generator, seed_of
from dreamlora.training import loop
from dreamlora.training.loop import Run
from dreamlora.training.stream import Layout, Stream


def initialise(run: Run, options: Any) -> None:
    """Start all adapters as ``--init`` says, or as they are with ``--init_lora``; the same in every process.

    Args:
        run: with adapters whose lora_B is zero.
        options: of the init, an instance of its plug-in's ``Options``.

    Raises:
        UserError: the init cannot do a layer.
    """
    method = registry.load("inits", run.config.lora.init)
    wait_for_everyone()  # another process may still load its model: here is the first collective after that
    run.model.train()  # gradient checkpointing is only on then
    if run.config.lora.init_lora is not None:
        for trained in run.trainables.values():
            _put(run, trained, trained.data.clone())
        return
    if not registry.load("adapters", run.config.lora.adapter).PAIRS:
        _redraw(run)
        return
    targets = list(targets_of(run))
    # The generator holds one layer's start at a time, hence no list.
    for target, start in zip(targets, method.starts(targets, options, _probe(run)), strict=True):
        for parameter, value in ((target.A, start.A), (target.B, start.B)):
            _put(run, parameter, value)
        if method.OFFSET:
            target.with_start(target.A, target.B)


def targets_of(run: Run) -> Iterator[Target]:
    """All adapted layers. Random draws go by the seed (each text encoder has its own) and the name in the model."""
    for number, (path, module) in enumerate(_modules(run)):
        for layer in adapted_layers(module):
            key = (run.config.train.seed + number, "lora", f"{layer.name}.lora_A.{ADAPTER}.weight")
            yield Target(**vars(replace(layer, name=f"{path}.{layer.name}")), key=key)


def _redraw(run: Run) -> None:
    """Draw what PEFT has drawn once more, in the same way but by the seed and the names; its zeros stay."""
    for number, (_, module) in enumerate(_modules(run)):
        for layer in tuned_layers(module):
            for name, parameter in layer.parameters.items():
                if parameter.any():
                    draw = generator(run.config.train.seed + number, "adapter", f"{layer.name}.{name}")
                    values = torch.empty(parameter.shape)
                    _put(run, parameter, nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=draw))


def _put(run: Run, parameter: Tensor, value: Tensor) -> None:
    """The same in every process."""
    values = value.to(parameter.device, parameter.dtype).reshape(parameter.shape).contiguous()
    parameter.data.copy_(broadcast(values) if run.accelerator.num_processes > 1 else values)


def _modules(run: Run) -> list[tuple[str, nn.Module]]:
    """What trains, by its path in the model."""
    model: Any = run.accelerator.unwrap_model(run.model)
    return [("denoiser", model.denoiser), *((f"encoders.{name}", each) for name, each in model.encoders.items())]


def _probe(run: Run) -> Probe:
    """Draws of a stream of their own, so that the training sees them no sooner than others."""
    train = run.config.train
    batch_size = train.train_batch_size or 1
    model = run.accelerator.unwrap_model(run.model)
    stream = Stream(
        run.stream.sources,
        run.objective,
        run.conditioning,
        Layout(batch_size, accumulation=1, rank=0, world=1),
        seed=seed_of(train.seed, "init"),
        noise_offset=train.noise_offset,
    )
    alone = replace(run, model=model, stream=stream)

    def loss(number: int) -> Tensor:
        with run.accelerator.autocast():
            return loop.micro_batch_loss(alone, loop.next_batches(alone, number, 0), 0)

    def total(value: Tensor) -> Tensor:
        summed: torch.Tensor = run.accelerator.reduce(value, "sum") if run.accelerator.num_processes > 1 else value
        return summed

    return Probe(model, loss, batch_size, run.accelerator.process_index, run.accelerator.num_processes, total)
