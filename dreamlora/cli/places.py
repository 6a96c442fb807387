"""Folders of images and of the run that must not be one another, told by their paths alone."""

from __future__ import annotations

from pathlib import Path

from dreamlora.config import RunConfig
from dreamlora.errors import UserError

DEFAULT_OUTPUTS = Path("outputs")
"""Where runs without ``--output_dir`` lie, and their class images."""


CLASSES = "--class_data_dir"


def image_folders(config: RunConfig) -> list[tuple[str, Path]]:
    """The folders of images that are given, each with its flag; a Hugging Face data set's too if it is one on disk."""
    given: list[tuple[str, Path | None]] = [(CLASSES, config.data.class_data_dir)]
    for one in config.data.each():
        dataset = Path(one.dataset_name) if one.dataset_name and Path(one.dataset_name).exists() else None
        given += [
            ("--instance_data_dir", one.instance_data_dir),
            ("--train_data_dir", one.train_data_dir),
            ("--dataset_name", dataset),
            ("--mask_data_dir", one.mask_data_dir),
            ("--conditioning_data_dir", one.conditioning_data_dir),
        ]
    return [(flag, path) for flag, path in given if path]


def check_folders(config: RunConfig) -> None:
    """Photos, class images and the run need folders of their own, none inside another's images.

    Else photos are learned as the class, class images are written among the photos, or the run's own pictures are the
    next run's photos.

    Raises:
        UserError: they have not, or one is missing or a file.
    """
    images = image_folders(config)
    for flag, path in images:
        if flag != CLASSES and not path.exists():
            raise UserError(f"{flag}: there is no {path} (looked from {Path.cwd()})")
        if path.exists() and not path.is_dir():
            raise UserError(f"{flag} {path} is a file: give the folder it lies in")
    classes = config.data.class_data_dir
    for flag, path in images:
        if classes and flag != CLASSES and (lies_in(path, classes) or lies_in(classes, path)):
            raise UserError(
                f"{flag} {path} and {CLASSES} {classes} are one folder, or one lies in the other: what is to be "
                "learned would be taken for the class too. Give them folders apart"
            )
    output = config.train.output_dir or DEFAULT_OUTPUTS
    for flag, path in images:
        if lies_in(output, path):
            given = "--output_dir" if config.train.output_dir else "the run would be written to"
            raise UserError(
                f"{given} {output} lies in {flag} {path}: the next run would take its pictures for yours. Give an "
                "--output_dir elsewhere"
            )


def lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder``, or below it, by whatever names and links; either need not exist."""
    real, place = path.resolve(), folder.resolve()
    if place in (real, *real.parents):
        return True
    # one folder can have two spellings that are no links: where case does not count, or where it is mounted twice
    above = (parent for parent in (real, *real.parents) if parent.exists())
    return place.exists() and any(parent.samefile(place) for parent in above)
