"""What trains: the denoiser with its LoRA, the text encoders that train too, and their optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.config import Optim
from dreamlora.config.rates import in_start_units, rate_outside_pairs
from dreamlora.errors import UserError
from dreamlora.interfaces import Components
from dreamlora.lora.assistant import add_assistant, as_loras
from dreamlora.lora.inject import add_lora, go_on
from dreamlora.lora.pairs import adapted_layers
from dreamlora.lora.targets import wanted_layers
from dreamlora.models.checkpointing import enable_checkpointing
from dreamlora.optimizers import _units, group_without_pairs, in_units, lora_param_groups
from dreamlora.optimizers._units import Units, has_units
from dreamlora.run import checks, continuing, new_tokens
from dreamlora.run.context import RunContext
from dreamlora.training.loop import Predictor, Run


def with_lora(context: RunContext, components: Components, text: Components | None) -> Predictor:
    """The denoiser (and the text encoders that train) with adapters and new tokens, as one module."""
    config, family = context.config, context.family
    denoiser = components[family.DENOISER]
    assistant = as_loras(denoiser, checks.assistant_of(context, components))
    add_adapter(context, family.DENOISER, denoiser)
    if assistant:
        add_assistant(denoiser, assistant)
    encoders = {name: text[name] for name in family.TEXT_ENCODERS} if text else {}
    for name, encoder in encoders.items() if config.lora.train_text_encoder else ():
        add_adapter(context, name, encoder)
    if config.model.gradient_checkpointing:
        enable_checkpointing(denoiser)
        for encoder in encoders.values():
            encoder.gradient_checkpointing_enable()
    if config.model.enable_xformers_memory_efficient_attention:
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError) as error:
            raise UserError(f"--enable_xformers_memory_efficient_attention: {error}") from error
    return Predictor(family, denoiser, text, config.train.guidance_scale, context.new_tokens)


def add_adapter(context: RunContext, name: str, module: Any) -> None:
    """Give a part of the pipeline the adapter that trains.

    Raises:
        UserError: it cannot have it.
    """
    lora, family = context.config.lora, context.family
    if context.predecessor:
        weights, new = continuing.weights_of(context, name, module)
        go_on(module, weights, new, lora.lora_dropout)
    elif name == family.DENOISER:
        add_lora(module, lora, wanted_layers(lora, family), name)
    else:
        add_lora(module, lora.of_text_encoder, family.TEXT_LORA_LAYERS, name)


def optimizer_of(context: RunContext, model: Predictor, options: Any) -> tuple[Any, Any]:
    """The optimizer, as accelerate prepares it, and its schedule."""
    optimizer, lr_scheduler = bare_optimizer_of(context, model, options)
    return context.accelerator.prepare(optimizer), lr_scheduler


def bare_optimizer_of(context: RunContext, model: Predictor, options: Any) -> tuple[Any, Any]:
    """The optimizer and its schedule. The schedule counts optimizer steps, whatever the processes and micro-batches."""
    optim, lora = context.config.optim, context.config.lora
    learning_rate: Any = optim.learning_rate  # a number by now
    groups = _groups(lora.adapter, optim, [model.denoiser], learning_rate, optim.adam_weight_decay)
    if lora.train_text_encoder:
        decay = optim.adam_weight_decay_text_encoder
        groups += _groups(lora.adapter, optim, list(model.encoders.values()), optim.text_encoder_lr, decay)
    groups += new_tokens.param_group(context, model)
    optimizer = registry.load("optimizers", optim.optimizer).build(groups, options)
    if in_start_units(optim):
        try:
            optimizer = in_units(optimizer)
        except ValueError as error:
            raise UserError(f"--lora_units start: --optimizer {optim.optimizer} cannot work in them: {error}") from None
    lr_scheduler = get_scheduler(
        optim.lr_scheduler,
        optimizer,
        num_warmup_steps=optim.lr_warmup_steps,
        num_training_steps=context.config.train.max_train_steps,
        num_cycles=optim.lr_num_cycles,
        power=optim.lr_power,
    )
    return optimizer, lr_scheduler


def measure_start(run: Run) -> None:
    """Take the LoRA as it is now for the start, to which the units of an optimizer belong that was made before."""
    if has_units(run.optimizer):
        layers = adapted_layers(run.accelerator.unwrap_model(run.model))
        _units.measure_start(run.optimizer, [(layer.A, layer.B, layer.scaling) for layer in layers])


def _groups(
    adapter: str, optim: Optim, modules: list[nn.Module], lr: float | None, decay: float | None
) -> list[dict[str, Any]]:
    """Parameter groups of modules; magnitudes of a DoRA do not decay, as that would shrink the base model's weights."""
    if not registry.load("adapters", adapter).PAIRS:
        return group_without_pairs(modules, lr=lr, weight_decay=decay)
    units: Units = "start" if in_start_units(optim) else "plain"
    other_lr = rate_outside_pairs(optim, lr or 0.0)
    groups = lora_param_groups(modules, lr=lr, weight_decay=decay, fallback_lr=other_lr, units=units)
    return [group if group["lora_pairs"] else {**group, "weight_decay": 0.0} for group in groups]


def training_tensors(run: Run) -> Iterator[Tensor]:
    """What training holds besides the model: what trains, its gradients, and the optimizer's state."""
    for parameter in run.trainables.values():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    for state in run.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
