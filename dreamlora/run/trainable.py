"""What trains: the denoiser with its LoRA, the text encoders that train too, and their optimizer."""

from __future__ import annotations

from typing import Any

from diffusers.optimization import get_scheduler

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.interfaces import Components
from dreamlora.lora.assistant import add_assistant, as_loras
from dreamlora.lora.inject import add_lora
from dreamlora.optimizers import lora_param_groups
from dreamlora.run import checks
from dreamlora.run.context import RunContext
from dreamlora.training.loop import Predictor


def with_lora(context: RunContext, components: Components, text: Components | None) -> Predictor:
    """The denoiser (and the text encoders that train) with adapters, as one module."""
    config, family = context.config, context.family
    denoiser = components[family.DENOISER]
    layers = config.lora.lora_layers or family.LORA_LAYERS
    assistant = as_loras(denoiser, checks.assistant_of(context, components))
    add_lora(denoiser, config.lora, layers)
    if assistant:
        add_assistant(denoiser, assistant)
    encoders = [text[name] for name in family.TEXT_ENCODERS] if text else []
    for encoder in encoders:
        add_lora(encoder, config.lora, family.TEXT_LORA_LAYERS)
    if config.model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        for encoder in encoders:
            encoder.gradient_checkpointing_enable()
    if config.model.enable_xformers_memory_efficient_attention:
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError) as error:
            raise UserError(f"--enable_xformers_memory_efficient_attention: {error}") from error
    return Predictor(family, denoiser, text, config.train.guidance_scale)


def optimizer_of(context: RunContext, model: Predictor, options: Any) -> tuple[Any, Any]:
    """The optimizer and its schedule. The schedule counts optimizer steps, whatever the processes and micro-batches."""
    optim = context.config.optim
    groups = lora_param_groups(model.denoiser, lr=optim.learning_rate, weight_decay=optim.adam_weight_decay)
    if len(model.encoders):
        groups += lora_param_groups(
            list(model.encoders.values()), lr=optim.text_encoder_lr, weight_decay=optim.adam_weight_decay_text_encoder
        )
    optimizer = registry.load("optimizers", optim.optimizer).build(groups, options)
    lr_scheduler = get_scheduler(
        optim.lr_scheduler,
        optimizer,
        num_warmup_steps=optim.lr_warmup_steps,
        num_training_steps=context.config.train.max_train_steps,
        num_cycles=optim.lr_num_cycles,
        power=optim.lr_power,
    )
    return context.accelerator.prepare(optimizer), lr_scheduler
