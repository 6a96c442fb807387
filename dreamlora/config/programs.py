"""Training programs besides DreamBooth: the same options and the same loop, but for a few flags and defaults."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from dreamlora.config.run import RunConfig, Train

_ABOUT_SUBJECTS = "it belongs to dreamlora dreambooth, which learns one subject; here every image has its own caption"


@dataclass(frozen=True)
class TextToImageTrain(Train):
    """Length of the run, its loss, its folder and its checkpoints."""

    train_batch_size: int | None = 16
    """Images per process and forward pass."""
    num_train_epochs: int = 100
    """Passes over the images, if --max_train_steps is not given."""


@dataclass(frozen=True)
class TextToImageConfig(RunConfig):
    """Train a LoRA on captioned images; defaults are those of diffusers' train_text_to_image_lora.py."""

    COMMAND: ClassVar[str] = "text-to-image"
    PRESET: ClassVar[str] = "preset_text_to_image.yaml"
    NOT_OFFERED: ClassVar[dict[str, str]] = {
        "instance_data_dir": "use --train_data_dir, with captions beside the images",
        "subject": "dreamlora dreambooth has built-in subjects; here there is --style",
        "instance_prompt": "every image needs a caption of its own; one prompt for all is for dreamlora dreambooth",
        **dict.fromkeys(
            (
                *("class_data_dir", "class_prompt", "with_prior_preservation", "prior_loss_weight"),
                *("num_class_images", "prior_generation_precision"),
            ),
            _ABOUT_SUBJECTS,
        ),
    }

    train: Train = field(default_factory=TextToImageTrain)


PROGRAMS: dict[str, type[RunConfig]] = {program.COMMAND: program for program in (RunConfig, TextToImageConfig)}


def program_of(options: Collection[str]) -> type[RunConfig]:
    """The program that a saved config, given by the names of its options, belongs to."""
    return next((p for p in PROGRAMS.values() if not p.NOT_OFFERED.keys() & set(options)), RunConfig)
