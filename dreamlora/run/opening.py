"""What comes before a run has its folder and its model: what is asked for is settled, looked through, and doubted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dreamlora import precision
from dreamlora.config import RunConfig
from dreamlora.config.plausible import doubts
from dreamlora.config.run import AUTO
from dreamlora.data.sets import epoch_length
from dreamlora.data.transforms import Preparations
from dreamlora.errors import UserError
from dreamlora.interfaces import Family, ModelSource
from dreamlora.lora.files import read_lora
from dreamlora.models import compiling
from dreamlora.models.adapter import find_adapter
from dreamlora.models.inventory import PartFiles, inventory
from dreamlora.models.loading import SCHEDULER, family_of, read_config, resolve_source
from dreamlora.models.parts import DTYPES, Parts, watch
from dreamlora.models.tf32 import set_tf32
from dreamlora.processes import main_first, tell_everyone
from dreamlora.run import checks, continuing, defaults, new_tokens, resume, unsaid_precision, upload, vram
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import warn_of_cut_texts
from dreamlora.run.images import RunImages, read_images
from dreamlora.run.launch import accelerator_of, before_accelerator
from dreamlora.runfolder import RunFolder
from dreamlora.training import state
from dreamlora.training.state import Checkpoint

T = TypeVar("T")


def begin(config: RunConfig) -> RunContext:
    """Accelerator, model source and family; the options that depend on them.

    Raises:
        UserError: something is found that would keep the run from ending well.
    """
    earlier = _earlier(config)
    config = unsaid_precision.with_precision(config, earlier)
    accelerator = accelerator_of(config)
    if config.eval.eval_steps != 0 or config.eval.eval_metrics:
        from dreamlora.metrics import _gathered  # noqa: F401 - torchmetrics: if it is broken, that is told now
    if config.train.push_to_hub:
        upload.check_hub(config)
    config = defaults.checkpointing(config)
    set_tf32(config.model.allow_tf32)
    precision.require("base_precision", config.model.base_precision, accelerator.device.type)
    text_device = config.model.text_encoder_device or accelerator.device.type
    precision.require("text_encoder_precision", config.model.text_encoder_precision, text_device)
    if config.model.compile:
        compiling.require_compiler(accelerator.device)
    source = resolve_source(config.model, config.train.prediction_type, None, config.train.rescale_betas_zero_snr)
    family = family_of(source, config.model.family)
    parts_on_disk = inventory(source, family)
    checks.require_parts(parts_on_disk)
    if config.lora.train_text_encoder and not family.TEXT_ENCODERS:
        raise UserError(
            f"--train_text_encoder: the family of {' and '.join(family.PIPELINES)} has no text encoder that can be "
            "trained: leave the flag out, and --text_encoder_lr with it"
        )
    _require_frozen_encoder(config, parts_on_disk, family)
    _require_images_to_edit(config, family, source)
    predecessor = continuing.predecessor_of(config, family, source, parts_on_disk)
    if predecessor:
        config = continuing.settled(config, predecessor)
    config = _with_resumed_rate(config, accelerator.is_main_process)
    open_rates = defaults.open_rates(config)
    config = defaults.by_model(
        config, family.resolution(source), family.sample_defaults(source), accelerator.num_processes
    )
    config = replace(config, model=replace(config.model, mixed_precision=accelerator.mixed_precision))
    if (config.data.resolution or 0) % family.SIDE_MULTIPLE:
        raise UserError(f"--resolution must be a multiple of {family.SIDE_MULTIPLE} (got {config.data.resolution})")
    data = defaults.bucket_step(config.data, family.SIDE_MULTIPLE)
    data = defaults.prompt_length(data, family.PROMPT_LENGTH, family.PROMPT_DEFAULT)
    config = replace(config, data=data)
    training = family.TEXT_ENCODERS if config.encodes_in_training else ()

    def parts_of(source: ModelSource) -> Parts:
        return Parts(family, source, accelerator.device, DTYPES[accelerator.mixed_precision], training)

    parts = parts_of(source)
    family.objective(parts.get("scheduler")["scheduler"], config.train)  # options of others are refused here
    context = RunContext(config, accelerator, family, source, parts, parts_on_disk, predecessor, open_rates=open_rates)
    if config.lora.training_adapter:
        context.training_adapter = _training_adapter(config)
    checks.require_layers(context)
    if config.model.vram:
        vram.settle(context, earlier)
        context.parts = parts_of(context.source)
        watch(context.memory, context.parts)
    checks.require_blocks(context)
    new_tokens.require(context)
    return context


def _earlier(config: RunConfig) -> vram.Options:
    """What ``--vram`` leaves as the run had it that is resumed."""
    if config.model.vram is None:
        return {}
    return _of_main(before_accelerator().is_main_process, lambda: vram.of_earlier_run(config))


def _with_resumed_rate(config: RunConfig, is_main: bool) -> RunConfig:
    """With the learning rate of the run that is resumed in place of ``auto``: it was tested once."""
    if config.optim.learning_rate != AUTO:
        return config
    rate = _of_main(is_main, lambda: defaults.resumed_rate(config))
    return config if rate is None else defaults.with_rate(config, ("learning_rate",), rate)


def _require_frozen_encoder(config: RunConfig, parts: Sequence[PartFiles], family: Family) -> None:
    """Nothing, if there is a text encoder that can work elsewhere than what trains, where that is asked for.

    Raises:
        UserError: all of them train.
    """
    if not (config.model.text_encoder_device and config.encodes_in_training):
        return
    encoders = [part.name for part in parts if part.role == "text" and part.size]
    if all(name in family.TEXT_ENCODERS for name in encoders):
        flag = "train_text_encoder" if config.lora.train_text_encoder else "new_tokens"
        raise UserError(
            f"--text_encoder_device {config.model.text_encoder_device}: with --{flag} the text encoders of this model "
            "are a part of every step and work where the denoiser does: leave one of the two flags out"
        )


def _require_images_to_edit(config: RunConfig, family: Family, source: ModelSource) -> None:
    """Nothing, if images to edit are given to a model that edits, and none to one that does not.

    Raises:
        UserError: they are given to another; or a model that cannot do without has none.
    """
    flags = {
        "conditioning_data_dir": any(one.conditioning_data_dir for one in config.data.each()),
        "validation_images": config.sample.validation_images,
    }
    given = next((flag for flag, value in flags.items() if value), None)
    if given and not family.shows_images(source):
        raise UserError(
            f"--{given}: {config.model.pretrained_model_name_or_path} draws from prompts alone, and edits no images: "
            "leave the flag out, or give a model that edits, such as FLUX.1-Kontext"
        )
    if family.text_pictures(source) and not all(one.conditioning_data_dir for one in config.data.each()):
        raise UserError(
            f"--conditioning_data_dir is needed: {config.model.pretrained_model_name_or_path} edits images, and does "
            "nothing without one; give the folder of the images before the edit"
        )


def _training_adapter(config: RunConfig) -> Path:
    name = config.lora.training_adapter or ""
    with main_first():
        found = find_adapter(name, config.lora.training_adapter_weight_name, config.model.cache_dir)
        return read_lora(found).path


@dataclass(frozen=True)
class Prelude:
    """What is known before a model is loaded.

    Attributes:
        pictures: images and prompts.
        checkpoint: to go on from; None: the training begins.
        complete: that the run was made already, in words; empty if it was not.
    """

    pictures: RunImages
    checkpoint: Path | None
    complete: str


def read(context: RunContext, folder: RunFolder, options: Any) -> Prelude:
    """Images, prompts and checkpoint; the options that depend on them.

    Raises:
        UserError: as ``begin``.
    """
    pictures = read_images(context, folder)
    how = Preparations.of(context.config.data, context.config.data.resolution or 0, context.config.train.seed)
    decided(context, lambda: checks.require_room(context, pictures.train, how))
    decided(context, lambda: warn_of_cut_texts(context, pictures))
    decided(context, lambda: new_tokens.warn_of_use(context, pictures))
    epoch = epoch_length(pictures.train, context.config.data)
    counts = defaults.ImageCounts(epoch, len(pictures.measured), len(pictures.learned))
    context.config = defaults.by_length(context.config, counts, context.accelerator.num_processes)
    context.eval_price = defaults.eval_price(context.config, counts, context.accelerator.num_processes)
    _doubt(context, counts)
    if context.eval_price.forwards:
        context.tell(str(context.eval_price))
    which = context.config.train.resume_from_checkpoint
    complete, path = "", None
    if which:
        settings = resume.settings(context, pictures, options)

        def fits(checkpoint: Checkpoint) -> None:
            resume.require_same(checkpoint, settings, pictures)

        complete = decided(context, lambda: resume.complete(context.config, folder, settings, pictures))
        path = None if complete else decided(context, lambda: state.find_checkpoint(folder, which, fits))
    return Prelude(pictures, path, complete)


def _doubt(context: RunContext, images: defaults.ImageCounts) -> None:
    """Tell of values that can hardly be meant and of flags that do nothing here."""
    own, world = context.family.resolution(context.source), context.accelerator.num_processes
    scheduler = read_config(context.source, SCHEDULER)
    facts = defaults.facts(context.config, own_options(context), scheduler, own, images.epoch, world)
    for doubt in (*checks.warnings(context), *doubts(context.config, facts)):
        context.warn(doubt)


def own_options(context: RunContext) -> set[str]:
    """Of the options that not all families use, those that count for this one of the family's models.

    Some have no input for guidance, or draw without classifier-free guidance where others have them.
    """
    options = set(context.family.OWN_OPTIONS)
    if context.guidance("").encoded_negative is None:
        options.discard("negative_prompt")
    if read_config(context.source, context.family.DENOISER).get("guidance_embeds") is False:
        options.discard("guidance_scale")
    return options


def decided(context: RunContext, decide: Callable[[], T]) -> T:
    """What the main process decides, in every process: others may not see its disk.

    Raises:
        UserError: the main process did.
    """
    return _of_main(context.accelerator.is_main_process, decide)


def _of_main(is_main: bool, decide: Callable[[], T]) -> T:
    outcome: Any = None
    if is_main:
        try:
            outcome = decide()
        except UserError as error:
            outcome = error
    outcome = tell_everyone(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    decision: T = outcome
    return decision
