"""How much memory every stage of a run takes, found without a weight (``run.passes``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.cli.parse import method_options
from dreamlora.config import RunConfig
from dreamlora.lora.files import read_lora
from dreamlora.lora.inject import trainable_parameters
from dreamlora.lora.pairs import ADAPTER
from dreamlora.memory import made_of
from dreamlora.models.offload import SLOTS
from dreamlora.optimizers import lora_param_groups
from dreamlora.run.context import RunContext
from dreamlora.run.passes import Computing, Passes

LORA_BYTES = 8
"""Per number of the LoRA: itself and its gradient, in float32; what the optimizer keeps comes on top."""
CHECKPOINT_BYTES = 16
"""The same in a checkpoint, which has the LoRA twice and no gradient, with two moments of the optimizer."""
AVERAGE_BYTES = 8
"""Of a moving average besides: itself, and the trained weights while it is shown. A checkpoint has one of them."""
HOW = (
    "weights as they are held, and the most that the model's own code holds at a time in a passage without numbers; "
    "the LoRA with its gradients, the optimizer's state and an average; as torch.cuda.max_memory_allocated counts, so "
    "without the driver's own (about 0.5 GiB) and gaps between tensors"
)
"""How memory is estimated, in words."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run, in bytes.

    Attributes:
        held: by weights that stay, and by LoRA and optimizer.
        work: by what is computed, at most; None: that cannot be told.
        rough: why it is only a sum over the layers, or why it cannot be told, in words.
        least: ``work`` where memory does not suffice for it, and images are taken one by one and in tiles; None: it is
            no less then.
    """

    name: str
    held: int
    work: int | None
    rough: str = ""
    least: int | None = None

    @property
    def most(self) -> int:
        """In all, where memory suffices; as far as it can be told."""
        return self.held + (self.work or 0)

    @property
    def needed(self) -> int:
        """In all, of what it cannot do without."""
        return self.held + ((self.work or 0) if self.least is None else self.least)


class Rehearsal:
    """What a run holds and computes.

    Args:
        context: with all options that the model decides.
        prompt: the longest.
        size: width and height of the largest images, in pixels.
        images: of a call that draws samples; 0: none are drawn.
    """

    def __init__(self, context: RunContext, prompt: str, size: tuple[int, int], images: int) -> None:
        self._context = context
        self._images = images
        self._about = (prompt, size, images)
        self.passes = Passes(context, prompt, size)

    def stages(self, config: RunConfig | None = None) -> list[Stage]:
        """The stages of a run, in their order.

        Args:
            config: the same run with others of the options that ``--vram`` decides; None: as it is. What was found
                for one is not gone through again for another.
        """
        config, passes = config or self._context.config, self.passes
        _, together = self._text(config)
        base = self.held(config)
        [autoencoder] = self._context.family.PARTS["vae"]
        vae = passes.stored[autoencoder].bytes(None)
        may_tile = passes.can_tile and config.model.vae_tiling is not False
        tiled = may_tile and config.model.vae_tiling is True
        prompts = passes.prompts() if together else Computing(0)
        stages = [
            Stage("encoding images", vae, *passes.encoding(tiled), passes.encoding(may_tile).peak),
            Stage("encoding prompts", together, *prompts),
            Stage("training", base, *self._step(config)),
        ]
        if self._images:
            least = self._drawing(config, 1, may_tile).peak
            stages.append(Stage("drawing samples", base + vae, *self._drawing(config, self._images, tiled), least))
            if config.train.parity_check:
                beside = self._all_text(config) if config.train.parity == "full" else 0
                stages.append(Stage("check at the end", base + vae + beside, *self._drawing(config, 1, tiled), least))
        return stages

    def held(self, config: RunConfig) -> int:
        """Bytes that stay while it trains: weights, LoRA and optimizer."""
        return self._denoiser(config) + self._text(config)[0] + self._lora

    def of(self, config: RunConfig) -> Rehearsal:
        """Of the same run with any other options."""
        return Rehearsal(replace(self._context, config=config), *self._about)

    @property
    def most_offloaded(self) -> int:
        """Blocks of the denoiser that can wait in the computer's memory."""
        return max(0, len(self.passes.blocks) - SLOTS)

    def _denoiser(self, config: RunConfig) -> int:
        """Bytes of its frozen weights on the device: with waiting blocks, those that stay and the ring."""
        word, count = config.model.base_precision, config.model.offload_blocks
        everything = self.passes.stored[self._context.family.DENOISER].bytes(word)
        if not count:
            return everything
        waiting = [block.bytes(word) for block in self.passes.waiting(count)]
        return everything - sum(waiting) + min(SLOTS, count) * max(waiting)

    def _text(self, config: RunConfig) -> tuple[int, int]:
        """Bytes of text encoders on the device: in training; and while prompts are encoded, by one that does not train
        at a time.
        """
        word = config.model.text_encoder_precision
        sizes = {name: self.passes.stored[name].bytes(word) for name in self.passes.text_encoders}
        trained = set(self._context.family.TEXT_ENCODERS) if config.encodes_in_training else set()
        kept = sum(size for name, size in sizes.items() if name in trained)
        if config.model.text_encoder_device:
            return kept, kept
        return kept, kept + max((size for name, size in sizes.items() if name not in trained), default=0)

    def _all_text(self, config: RunConfig) -> int:
        """Bytes of all text encoders, where they are on the device."""
        word, device = config.model.text_encoder_precision, config.model.text_encoder_device
        return 0 if device else sum(self.passes.stored[name].bytes(word) for name in self.passes.text_encoders)

    @cached_property
    def _lora(self) -> int:
        """Bytes of all that trains, with its optimizer; and of a frozen training adapter, in float32."""
        config, file = self._context.config, self._context.training_adapter
        per_number = LORA_BYTES + (AVERAGE_BYTES if config.optim.ema_decay else 0) + state_bytes(config)
        frozen = 4 * sum(map(math.prod, read_lora(file).shapes.values())) if file else 0
        return int(per_number * self.passes.parameters()) + frozen

    def _step(self, config: RunConfig) -> Computing:
        """Of a micro-batch."""
        samples = (config.train.train_batch_size or 1) * (1 + config.data.with_prior_preservation)
        one = self.passes.step(config.model.gradient_checkpointing)
        return one.times(samples).plus(self._unpacking(config))

    def _drawing(self, config: RunConfig, images: int, tiled: bool) -> Computing:
        """Of a call of the denoiser, or of the decoding behind it, whichever is more."""
        call, decoding = self.passes.call().times(images), self.passes.decoding(tiled).times(1 if tiled else images)
        call = call.plus(self._unpacking(config))
        return call if (call.peak or 0) >= (decoding.peak or 0) else Computing(decoding.peak, call.rough)

    def _unpacking(self, config: RunConfig) -> int:
        """Of the denoiser's largest layer while it computes, where its weights are in fewer bits."""
        denoiser = self.passes.stored[self._context.family.DENOISER]
        return denoiser.unpacking(config.model.base_precision, self.passes.dtype)


def state_bytes(config: RunConfig) -> float:
    """Bytes that the optimizer keeps for a number of the LoRA, found by a step with a small one."""
    optim = config.optim
    common = {"betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon}
    options = method_options("optimizers", optim.optimizer, optim.optimizer_args, common)
    with torch.random.fork_rng(devices=[]):
        module = nn.ModuleDict({"layer": nn.Linear(512, 512)}).requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=16, target_modules=["layer"]), module, adapter_name=ADAPTER)
        parameters = trainable_parameters(module).values()
        groups = lora_param_groups([module], lr=1e-4, weight_decay=0.0)
        try:
            optimizer = registry.load("optimizers", optim.optimizer).build(groups, options)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        except (RuntimeError, NotImplementedError):  # its kernels are for GPUs alone
            return _TWO_MOMENTS
    held = sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(list(optimizer.state.values())))
    return held / sum(parameter.numel() for parameter in parameters)


_TWO_MOMENTS = 8.0


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from made_of(value)
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(one)
