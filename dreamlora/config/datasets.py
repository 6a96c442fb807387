"""Several data sets in one run: an entry of the list ``datasets`` in a --config file. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dreamlora.config.ranges import at_least
from dreamlora.errors import UserError

SOURCES = ("instance_data_dir", "train_data_dir", "dataset_name")
"""Options that say where images come from: a folder (of DreamBooth, or with captions), or Hugging Face datasets."""


@dataclass(frozen=True)
class DataSet:
    """One of several data sets; what it leaves open is as the flag of the same name says for all."""

    instance_data_dir: Path | None = None
    """Folder with its images."""
    train_data_dir: Path | None = None
    """Folder with its captioned images."""
    dataset_name: str | None = None
    """A Hugging Face datasets name instead."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    image_column: str | None = None
    """Its column with the images."""
    caption_column: str | None = None
    """Its column with the captions."""
    instance_prompt: str | None = None
    """Caption of its images that have none of their own."""
    repeats: int | None = None
    """How often each of its images is seen in an epoch."""
    max_train_samples: int | None = None
    """Use only its first N images."""
    resolution: int | None = None
    """Side of its square training images in pixels."""
    mask_data_dir: Path | None = None
    """Folder with masks of its images."""
    loss_weight: float = 1.0
    """Factor of its images' loss."""

    def __post_init__(self) -> None:
        at_least(self, 1, "repeats", "max_train_samples")
        at_least(self, 8, "resolution")
        at_least(self, 0, "loss_weight")
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UserError(f"a data set needs one of {', '.join(SOURCES)} (got {got})")

    @property
    def name(self) -> str:
        """Of the folder, or of the Hugging Face data set."""
        folder = self.instance_data_dir or self.train_data_dir
        return folder.resolve().name if folder else Path(str(self.dataset_name)).name

    def given(self) -> dict[str, Any]:
        """What the entry says, by option."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def instance_prompt_of(options: Mapping[str, Any]) -> str | None:
    """The prompt that names the subject, in the options of a saved run: the flag's, or that of the first data set with
    one.
    """
    entries = [options, *(options.get("datasets") or ())]
    return next((entry["instance_prompt"] for entry in entries if entry.get("instance_prompt")), None)
