"""Options left open are decided: what depends on the model, then what depends on the number of images.

Afterwards no option that the run uses is ``None``, and the saved config says exactly what was done.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dreamlora import registry
from dreamlora.cli.places import DEFAULT_OUTPUTS, check_folders, image_folders, lies_in
from dreamlora.config import Data, Lora, RunConfig
from dreamlora.config.adapting import check_adapter
from dreamlora.config.plausible import Facts
from dreamlora.config.rates import default_rate, finds_rate
from dreamlora.config.run import AUTO
from dreamlora.data.buckets import default_step
from dreamlora.errors import UserError
from dreamlora.eval_loss.price import Price, Workload, affordable
from dreamlora.interfaces import SampleDefaults
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.prompts import Subject, with_subject

DEFAULT_BATCH = 4
_UNUSED_LENGTH = 512
DEFAULT_SAMPLES = 5
MIN_EVAL_STEPS = 25
RATES = ("learning_rate", "text_encoder_lr")

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


def by_model(config: RunConfig, resolution: int, sampling: SampleDefaults, world: int) -> RunConfig:
    """Fill in what the base model, the optimizer and the number of processes decide.

    Args:
        config: as given.
        resolution: the model's own, in pixels.
        sampling: the family's defaults.
        world: number of processes.

    Raises:
        UserError: see ``check_adapter``, ``check_average`` and ``check_rate``; or a prompt has a ``{}`` and nothing is
            known for it.
    """
    check_adapter(config)
    check_average(config)
    check_rate(config)
    batch_size = config.train.train_batch_size or max(1, DEFAULT_BATCH // world)
    method = registry.load("optimizers", config.optim.optimizer)
    start = registry.load("inits", config.lora.init)
    given = config.optim.learning_rate
    learning_rate = given if isinstance(given, int | float) else default_rate(config)
    # Decay pulls B A to zero; where it is counted from another start, that is no way back to the base model.
    default_decay = 0.0 if start.OFFSET else method.DEFAULT_WEIGHT_DECAY
    weight_decay = _first(config.optim.adam_weight_decay, default_decay)
    if start.OFFSET and weight_decay:
        logger.warning("--adam_weight_decay with --init %s pulls away from the base model", config.lora.init)
    optim = replace(config.optim, learning_rate=learning_rate, adam_weight_decay=weight_decay)
    if config.lora.train_text_encoder:
        optim = replace(
            optim,
            text_encoder_lr=_first(optim.text_encoder_lr, learning_rate),
            adam_weight_decay_text_encoder=_first(optim.adam_weight_decay_text_encoder, weight_decay),
        )
    subject = Subject.of(config.data.subject_prompt, config.data.class_prompt)
    sample = with_subject(config.sample, subject)
    sample = replace(
        sample,
        num_inference_steps=_first(config.sample.num_inference_steps, sampling.num_inference_steps),
        sample_guidance_scale=_first(config.sample.sample_guidance_scale, sampling.guidance_scale),
        negative_prompt=_first(sample.negative_prompt, sampling.negative_prompt),
        num_images_per_prompt=_first(config.sample.num_validation_images, config.sample.num_images_per_prompt),
    )
    return replace(
        config,
        data=replace(config.data, resolution=config.data.resolution or resolution),
        lora=_with_alpha(config.lora),
        optim=optim,
        sample=sample,
        train=replace(config.train, train_batch_size=batch_size),
    )


def _with_alpha(lora: Lora) -> Lora:
    """Where all layers have one rank, that is the alpha unless another is given; else each layer's own rank is."""
    return replace(lora, lora_alpha=_first(lora.lora_alpha, float(lora.rank))) if lora.uniform else lora


def check_average(config: RunConfig) -> None:
    """Nothing, if the optimizer does not average by itself what ``--ema_decay`` would average once more.

    Raises:
        UserError: it does.
    """
    optim = config.optim
    if optim.ema_decay and getattr(registry.load("optimizers", optim.optimizer), "OWN_SCHEDULE", False):
        raise UserError(
            f"--ema_decay: --optimizer {optim.optimizer} keeps an average of its own, which is what is measured, drawn "
            "and saved. Leave --ema_decay out, or take another optimizer"
        )


def check_rate(config: RunConfig) -> None:
    """Nothing, if the optimizer has a learning rate to look for where that is asked for.

    Raises:
        UserError: it finds one by itself.
    """
    optim = config.optim
    if optim.learning_rate == AUTO and finds_rate(optim.optimizer):
        raise UserError(
            f"--learning_rate auto: --optimizer {optim.optimizer} finds its rate by itself as it trains, and "
            "--learning_rate is a factor on what it finds: leave it out, or take another optimizer"
        )


def open_rates(config: RunConfig) -> tuple[str, ...]:
    """The options that a range test gives their rate: ``--learning_rate auto``, and what follows it; empty: none."""
    if config.optim.learning_rate != AUTO:
        return ()
    follows = config.lora.train_text_encoder and config.optim.text_encoder_lr is None
    return RATES if follows else RATES[:1]


def with_rate(config: RunConfig, names: Collection[str], rate: float) -> RunConfig:
    """The run with one rate for all options of these names."""
    rates: dict[str, Any] = dict.fromkeys(names, rate)
    return replace(config, optim=replace(config.optim, **rates))


def bucket_step(data: Data, multiple: int) -> Data:
    """Fill in the step of the aspect-ratio buckets.

    Args:
        data: with a resolution.
        multiple: sides of the model's images are multiples of it.

    Raises:
        UserError: the given step is not.
    """
    if not data.buckets:
        return data
    step = _first(data.bucket_step, default_step(data.resolution or 0, multiple))
    if step % multiple:
        raise UserError(f"--bucket_step must be a multiple of {multiple} (got {step})")
    return replace(data, bucket_step=step)


def prompt_length(data: Data, option: str, own: int | None) -> Data:
    """Fill in the length of prompts in tokens, begin and end included: the family's own, or that of several chunks.

    Args:
        data: the options.
        option: that the model's family goes by.
        own: its value unless given.

    Raises:
        UserError: the family reads no prompts in chunks.
    """
    # where it does not count it is what earlier versions saved, so that their checkpoints can be resumed
    data = replace(data, max_sequence_length=data.max_sequence_length or own or _UNUSED_LENGTH)
    if data.max_token_length is None:
        return data
    if option != "tokenizer_max_length":
        raise UserError(
            "--max_token_length is for models whose prompts CLIP reads in chunks; for this one there is "
            f"--{option} (now {getattr(data, option)})"
        )
    return replace(data, tokenizer_max_length=data.max_token_length + 2)


@dataclass(frozen=True)
class ImageCounts:
    """How many images a run has.

    Attributes:
        epoch: samples in an epoch: training images, each as often as its repeats say.
        measured: that the evaluation loss is about.
        learned: training images that are measured too, for the gap.
    """

    epoch: int
    measured: int
    learned: int


def by_length(config: RunConfig, images: ImageCounts, world: int) -> RunConfig:
    """Fill in what the number of images decides: steps, and how often to sample and to evaluate.

    Args:
        config: with what the model decides.
        images: of the run.
        world: number of processes.
    """
    global_batch = _global_batch(config, world)
    steps_per_epoch = math.ceil(images.epoch / global_batch)
    total = config.train.max_train_steps or steps_per_epoch * config.train.num_train_epochs
    sample_steps = config.sample.sample_steps
    if sample_steps is None and config.sample.validation_epochs:
        sample_steps = config.sample.validation_epochs * steps_per_epoch
    if sample_steps is None:
        sample_steps = math.ceil(total / DEFAULT_SAMPLES)
    config = replace(config, train=replace(config.train, max_train_steps=total))
    work = _workload(config, images, world)
    eval_steps, final_items = affordable(work, config.eval.eval_steps, config.eval.final_eval_items, MIN_EVAL_STEPS)
    evaluation = replace(config.eval, eval_steps=eval_steps, final_eval_items=final_items)
    if evaluation.eval_metrics:
        usual = sample_steps or math.ceil(total / DEFAULT_SAMPLES)
        evaluation = replace(evaluation, eval_metrics_steps=_first(evaluation.eval_metrics_steps, usual))
    optim = replace(config.optim, scale_lr=False, lr_warmup_steps=_steps_of(config.optim.lr_warmup_steps, total))
    tokens = config.tokens
    if tokens.new_tokens_end is not None:
        tokens = replace(tokens, new_tokens_end=_steps_of(tokens.new_tokens_end, total))
    if config.optim.scale_lr:
        optim = replace(optim, **{name: rate * global_batch for name in RATES if (rate := getattr(optim, name))})
        tokens = replace(tokens, new_tokens_lr=tokens.new_tokens_lr and tokens.new_tokens_lr * global_batch)
    return replace(
        config,
        tokens=tokens,
        optim=optim,
        sample=replace(config.sample, sample_steps=sample_steps),
        eval=evaluation,
    )


def _steps_of(steps_or_share: float, total: int) -> int:
    """Steps; a share is of ``total``, and at least one step."""
    return max(1, round(steps_or_share * total)) if 0 < steps_or_share < 1 else int(steps_or_share)


def facts(
    config: RunConfig, options: Collection[str], scheduler: Mapping[str, Any], resolution: int, epoch: int, world: int
) -> Facts:
    """What ``plausible.doubts`` needs to know of a run besides its options.

    Args:
        config: with all options decided.
        options: of those that not all families use, the ones that count for this model.
        scheduler: the config of its scheduler.
        resolution: the model's own, in pixels.
        epoch: samples in one passage through the images.
        world: number of processes.
    """
    return Facts(
        resolution,
        epoch,
        _global_batch(config, world),
        options,
        scheduler.get("prediction_type"),
        scheduler.get("rescale_betas_zero_snr") is True,
    )


def checkpointing(config: RunConfig) -> RunConfig:
    """Gradient checkpointing is on where blocks wait in host memory: backwards their weights have to come once more.

    Raises:
        UserError: it was switched off.
    """
    model = config.model
    if not model.offload_blocks or model.gradient_checkpointing:
        return config
    if "gradient_checkpointing" in config.given:
        raise UserError(
            f"--offload_blocks {model.offload_blocks} needs --gradient_checkpointing, which was switched off: leave "
            "one of the two out"
        )
    return replace(config, model=replace(model, gradient_checkpointing=True))


def eval_price(config: RunConfig, images: ImageCounts, world: int) -> Price:
    """What the evaluation loss costs a run all of whose options are decided."""
    return _workload(config, images, world).price(config.eval.eval_steps or 0, config.eval.final_eval_items or 0)


def _workload(config: RunConfig, images: ImageCounts, world: int) -> Workload:
    sources = 2 if config.data.with_prior_preservation else 1
    return Workload(
        steps=config.train.max_train_steps or 0,
        samples_per_step=_global_batch(config, world) * sources,
        images=images.measured,
        gap_images=images.learned,
        checkpointing=config.model.gradient_checkpointing,
        averaged=bool(config.optim.ema_decay),
    )


def _global_batch(config: RunConfig, world: int) -> int:
    return (config.train.train_batch_size or 1) * config.train.gradient_accumulation_steps * world


def run_folder(config: RunConfig) -> RunFolder:
    """The folder that ``config`` asks for; without ``--output_dir`` a new one under outputs/, or the newest to resume.

    Raises:
        UserError: it holds a run and neither ``--resume_from_checkpoint`` nor ``--overwrite_output_dir`` is given; it
            would mix with a folder of images; or a part of it lies elsewhere, behind a link.
    """
    check_folders(config)
    resume = config.train.resume_from_checkpoint
    if config.train.output_dir is None:
        folder = _default_folder(config, new=not resume and not config.train.overwrite_output_dir)
        _refuse_images_in(folder, config)
        folder.refuse_links_out()
        return folder
    folder = RunFolder(config.train.output_dir)
    _refuse_images_in(folder, config)
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--output_dir {folder.path} is a file: give a folder")
    if folder.holds_run() and not resume and not config.train.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder.path} holds a run already: go on with --resume_from_checkpoint latest, replace it "
            "with --overwrite_output_dir, or give another folder"
        )
    folder.refuse_links_out()
    return folder


def resumed_folder(config: RunConfig) -> RunFolder | None:
    """The folder of the run that is resumed; None: none is. Main process only.

    Raises:
        UserError: see ``run_folder``.
    """
    which = config.train.resume_from_checkpoint
    if not which:
        return None
    folder = run_folder(config)
    if which != "latest":
        folder = RunFolder(folder.named_checkpoint(which).parent.parent)
    return folder if folder.holds_run() else None


def resumed_rate(config: RunConfig) -> float | None:
    """The learning rate of the run that is resumed, if that has got so far that it goes on. Main process only.

    Raises:
        UserError: see ``run_folder``.
    """
    folder = resumed_folder(config)
    if folder is None or not (folder.checkpoint_steps() or folder.holds_result()):
        return None
    return folder.config().get("learning_rate")


def _refuse_images_in(folder: RunFolder, config: RunConfig) -> None:
    """Images where the run writes: ``--overwrite_output_dir`` would remove them."""
    for flag, images in image_folders(config):
        if any(lies_in(images, entry) for entry in folder.entries()):
            raise UserError(
                f"{flag} {images} is where the run writes files of its own: move the images elsewhere, or give another "
                "--output_dir"
            )


def _default_folder(config: RunConfig, new: bool) -> RunFolder:
    data = config.data
    name = Path(data.dataset_name or data.subject or data.style or "run").name
    if folder := data.instance_data_dir or data.train_data_dir:
        name = folder.resolve().name
    if data.datasets:
        name = data.datasets[0].name
    path = DEFAULT_OUTPUTS / f"{name}-{config.optim.optimizer}"
    number = 1
    while RunFolder(_numbered(path, number)).holds_run():
        number += 1
    return RunFolder(_numbered(path, number if new else max(1, number - 1)))


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


def _first(value: _T | None, otherwise: _T) -> _T:
    return otherwise if value is None else value
