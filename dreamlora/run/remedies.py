"""Which flags take less memory, where it did not suffice for a run: those of the stage, without what is set already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dreamlora import precision
from dreamlora.errors import UserError
from dreamlora.memory import Shortage
from dreamlora.run import vram
from dreamlora.run.context import RunContext
from dreamlora.run.resume import FREE_ON_RESUME
from dreamlora.runfolder import RunFolder

SMALLER = ("int8", "nf4")
"""Weights in fewer bits, by what they cost in quality."""


def of_run(context: RunContext, shortage: Shortage) -> str:
    """What to try, in sentences without the last one's end; and how to go on from what is there."""
    flags = list(_flags(context, shortage))
    folder = context.config.train.output_dir
    begun = folder is not None and bool(RunFolder(folder).checkpoint_steps())
    advice = in_a_sentence([f"{flag} (in a new run)" if begun and not _is_free(flag) else flag for flag in flags])
    if shortage.total and not shortage.on_host and shortage.stage != "image metrics":
        fitting = vram.flags_that_fit(context, shortage.total)
        if fitting:
            how = " in a new run" if begun and not _is_free(fitting) else ""
            advice += f". By the estimate of dreamlora doctor it fits with {fitting}{how}"
    if begun:
        advice += ". What was written is whole: --resume_from_checkpoint latest goes on from it"
    return advice


def in_a_sentence(flags: Sequence[str]) -> str:
    """What to try, one after the other; without an end."""
    return f"What takes less, to be tried in this order: {'; '.join(flags)}" if flags else "This needs more memory"


def smaller(flag: str, now: str | None, device: str) -> Iterator[str]:
    """The flag with every word that takes less than the present one, and that can be computed here."""
    words = SMALLER[1:] if now in ("fp8", "int8") else () if now == "nf4" else SMALLER
    for word in words:
        try:
            precision.require(flag, word, device)
        except UserError:
            continue
        yield f"--{flag} {word}"


def _flags(context: RunContext, shortage: Shortage) -> Iterator[str]:
    if shortage.on_host and context.accelerator.device.type != "cpu":
        return _of_host(context)  # what the GPU computes is not what is lacking
    of_stage = {"encoding images": _of_images, "encoding prompts": _of_prompts, "image metrics": _of_metrics}
    if shortage.stage in of_stage:
        return of_stage[shortage.stage](context)
    return _of_denoiser(context, shortage.stage)


def _of_host(context: RunContext) -> Iterator[str]:
    if context.config.data.dataloader_num_workers:
        yield "--dataloader_num_workers 0"
    if context.config.model.offload_blocks:
        yield "a smaller --offload_blocks"
    yield "ending other programs"


def _of_images(context: RunContext) -> Iterator[str]:
    if context.config.data.dataloader_num_workers:
        yield "--dataloader_num_workers 0"
    if context.config.model.vae_tiling is False:
        yield "no --no_vae_tiling"
    yield f"a --resolution below {context.config.data.resolution}"


def _of_prompts(context: RunContext) -> Iterator[str]:
    config, device = context.config, context.accelerator.device.type
    if context.accelerator.mixed_precision == "no":
        yield "--mixed_precision bf16"
    yield from smaller("text_encoder_precision", config.model.text_encoder_precision, device)
    if device != "cpu" and config.model.text_encoder_device is None and not config.encodes_in_training:
        yield "--text_encoder_device cpu"


def _of_metrics(context: RunContext) -> Iterator[str]:
    yield "a smaller --clip_model or --dino_model"
    yield "no --eval_metrics, and dreamlora evaluate afterwards"


def _of_denoiser(context: RunContext, stage: str) -> Iterator[str]:
    config, device = context.config, context.accelerator.device.type
    if stage == "evaluation loss" and config.eval.eval_batch_size > 1:
        yield "--eval_batch_size 1"
    if stage in ("training", "starting the LoRA"):
        yield from _of_training(context)
    if stage == "class images" and config.data.prior_generation_precision in ("no", "fp32"):
        yield "--prior_generation_precision bf16"
    elif context.accelerator.mixed_precision == "no":
        yield "--mixed_precision bf16"
    yield from smaller("base_precision", config.model.base_precision, device)
    if device != "cpu" and not config.model.offload_blocks:
        instead = " and without --compile" if config.model.compile else ""
        yield f"--offload_blocks N with --gradient_checkpointing{instead} (N blocks wait in the computer's memory)"
    if stage == "drawing samples":
        yield "--sample_steps 0, and dreamlora sample afterwards"
    yield f"a --resolution below {config.data.resolution}"


def _of_training(context: RunContext) -> Iterator[str]:
    """What costs time alone."""
    config, size = context.config, context.config.train.train_batch_size or 1
    if not config.model.gradient_checkpointing:
        yield "--gradient_checkpointing"
    if size > 1:
        times = config.train.gradient_accumulation_steps * size
        yield f"--train_batch_size 1 --gradient_accumulation_steps {times}"


def _is_free(flag: str) -> bool:
    """Whether a resumed run may be given these flags."""
    names = [word.removeprefix("--") for word in flag.split() if word.startswith("--")]
    return all(name in FREE_ON_RESUME for name in names)
