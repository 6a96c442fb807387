"""What can be known to be wrong before torch is imported, which takes seconds, is told by then. Nothing is written."""

from __future__ import annotations

from dreamlora.config import RunConfig
from dreamlora.config.adapting import check_adapter
from dreamlora.config.model import check_package
from dreamlora.data.dataset import list_images
from dreamlora.data.hub import check_dataset
from dreamlora.data.mask_files import list_masks
from dreamlora.errors import UserError
from dreamlora.lora.names import model_names
from dreamlora.models.local import check_model
from dreamlora.run import defaults
from dreamlora.sampling.prompts import Subject, read_prompts


def check(config: RunConfig) -> None:
    """All checks that need neither torch nor a download.

    A folder of images is listed and its captions are read, which the run does once more: some seconds where there are a
    hundred thousand.

    Raises:
        UserError: an option cannot be used, see ``check_inputs``; or the run's folder cannot, or there is no such
            checkpoint.
    """
    check_inputs(config)
    folder = defaults.run_folder(config)
    which = config.train.resume_from_checkpoint
    if which and which != "latest":
        folder.named_checkpoint(which)


def check_inputs(config: RunConfig) -> None:
    """The same without the run's own folder.

    Raises:
        UserError: images, captions, prompts, model or a place of files cannot be used.
    """
    _check_places(config)
    check_model(config.model)
    check_methods(config)
    _check_formats(config)
    data = config.data
    subject = Subject.of(data.subject_prompt, data.class_prompt)
    for file in (config.sample.sample_prompts, config.eval.eval_prompts):
        if file:
            read_prompts(file, subject)
    if not (data.brings_images or data.style or data.subject):
        raise UserError("nothing to train on: give --instance_data_dir (--train_data_dir), or --dataset_name")
    for one in data.each() if data.brings_images else ():
        if one.dataset_name:
            check_dataset(one.dataset_name)
        else:
            list_masks(list_images(one), one)


def check_methods(config: RunConfig) -> None:
    """Nothing, if adapter, start, optimizer and average go together, and the packages for weights are there.

    Raises:
        UserError: they do not.
    """
    check_adapter(config)
    for flag in ("base_precision", "text_encoder_precision"):
        check_package(flag, getattr(config.model, flag))
    defaults.check_average(config)
    defaults.check_rate(config)


def _check_places(config: RunConfig) -> None:
    for flag, path in (
        ("cache_dir", config.model.cache_dir),
        ("latents_cache_dir", config.data.latents_cache_dir),
    ):
        if path is not None and path.exists() and not path.is_dir():
            raise UserError(f"--{flag} {path} is a file: give a folder")
    weights = config.encoders.inception_weights
    if weights is not None and weights.is_dir():
        raise UserError(f"--inception_weights {weights} is a folder: give the file in it")


def _check_formats(config: RunConfig) -> None:
    """As far as the family is given; else when it is known."""
    names = model_names(config.model.family, {}) if config.model.family else None
    for form in config.train.save_format:
        if names and (lacking := names.lacking(form)):
            raise UserError(f"--save_format {form}: {lacking}")
