"""The processes of a program, as ``accelerate launch`` started them. What they cannot do is refused by name, at once.

Every process holds the whole model and does its share of the images. ``accelerate launch`` hands its flags and its
config file on as environment variables, which accelerate would act on, or pass over, without a word.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, parse_flag_from_env

from dreamlora.config import RunConfig
from dreamlora.errors import UserError
from dreamlora.run.trackers import check_tracker

STRATEGIES = {
    "ACCELERATE_USE_FSDP": ("FSDP", "--use_fsdp"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--use_deepspeed"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--use_megatron_lm"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("tensor or context parallelism", "--use_parallelism_config"),
}
"""What is refused, with its flag, by the variable that asks for it."""

KNOWN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""What several processes are known to work on; one process may have any device."""


def accelerator_of(config: RunConfig) -> Accelerator:
    """Processes, device, precision and trackers of a run; the trackers' folder is set once the run folder is known.

    Raises:
        UserError: accelerate was set to something that training cannot do, or a tracker or precision is not there.
    """
    _check_strategy()
    _check_training(config)
    check_tracker(config)
    try:
        accelerator = Accelerator(
            mixed_precision=config.model.mixed_precision,
            # The loop weighs its micro-batches itself; a number from accelerate's own settings would divide twice.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=config.train.report_to,
            project_config=ProjectConfiguration(logging_dir=str(config.train.logging_dir)),
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {config.model.mixed_precision}: {error}") from error
    _check_kind(accelerator.distributed_type)
    return accelerator


def before_accelerator() -> PartialState:
    """The processes of a run before its precision is known, as ``accelerator_of`` will find them.

    Raises:
        UserError: see there.
    """
    _check_strategy()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def processes() -> PartialState:
    """The processes that share a piece of work, for a program that trains nothing.

    Raises:
        UserError: accelerate was set to something that they cannot do.
    """
    _check_strategy()
    # told that it is a CPU: accelerate would take every process without a GPU for the only one
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    _check_kind(state.distributed_type)
    return state


def _check_strategy() -> None:
    for variable, (name, flag) in STRATEGIES.items():
        if os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off"):
            raise UserError(
                f"{name} is not supported ({variable} is set, by accelerate launch {flag} or its config file): "
                "every process holds the whole model. Start with accelerate launch --multi_gpu, or run accelerate "
                "config anew. What saves memory is --mixed_precision bf16 and --gradient_checkpointing"
            )


def _check_training(config: RunConfig) -> None:
    """Settings of accelerate's that only concern training."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"accelerate's dynamo_backend is {backend.lower()}, which would compile the model without its LoRA: give "
            "--compile behind the script's name, and start with accelerate launch --dynamo_backend no, or run "
            "accelerate config anew"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "fp8" and config.model.mixed_precision is None:
        raise UserError("accelerate's mixed_precision is fp8, which is not supported: give --mixed_precision bf16")
    steps, given = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"), config.train.gradient_accumulation_steps
    if steps not in (None, "1", str(given)):
        raise UserError(
            f"accelerate's gradient_accumulation_steps is {steps}, which does not count here, and "
            f"--gradient_accumulation_steps is {given}: give --gradient_accumulation_steps {steps} behind the script's "
            "name, or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )


def _check_kind(kind: DistributedType) -> None:
    if kind not in KNOWN:
        known = ", ".join(one.value for one in KNOWN[1:])
        raise UserError(
            f"accelerate runs this as {kind.value}, which is not known to work: several processes can be {known}. "
            "Start one process, without accelerate launch"
        )
