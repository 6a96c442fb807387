"""The images before an edit that samples of models that edit are drawn from: one for every prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps

from dreamlora.errors import UserError
from dreamlora.files import replacing
from dreamlora.pictures import own_picture
from dreamlora.runfolder import RunFolder

Shown = Mapping[str, Image.Image]
"""By prompt."""


def shown_with(prompts: Sequence[str], images: Sequence[Image.Image], side: int) -> dict[str, Image.Image]:
    """An image for every prompt: the only one, else each prompt's own, in their order and from the first again.

    Args:
        prompts: of the samples.
        images: RGB, of any size; none: no prompt has one.
        side: of the samples in pixels; images are cropped to the middle square and resized to it.
    """
    fitted = [ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS) for image in images]
    return {prompt: fitted[number % len(fitted)] for number, prompt in enumerate(dict.fromkeys(prompts)) if fitted}


def require_for_prompts(images: Sequence[Path], prompts: Sequence[str]) -> None:
    """Nothing, if there is one image for all prompts, or one for each.

    Raises:
        UserError: there is another number.
    """
    if len(images) > 1 and len(images) != len(prompts):
        raise UserError(
            f"--validation_images: {len(images)} images for {len(prompts)} prompts: give one for all, or one for each"
        )


def digest(image: Image.Image) -> str:
    """12 hex digits of an image's pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:12]


def keep(shown: Shown, folder: RunFolder) -> None:
    """Write the images into the run folder, so that the run's LoRA can be drawn from them later."""
    for image in shown.values():
        file = folder.conditioning_file(digest(image))
        if not file.exists():
            with replacing(file) as temporary:
                image.save(temporary, "PNG")


def kept(prompts: Iterable[str], folder: RunFolder) -> dict[str, Image.Image]:
    """The images that a run's samples of these prompts were drawn from; only those of prompts that it drew."""
    wanted, found = set(prompts), {}
    for row in folder.sample_rows():
        name = row.get("conditioning")
        if name and row["prompt"] in wanted and row["prompt"] not in found:
            found[row["prompt"]] = own_picture(folder.conditioning_file(name), folder.path)
    return found
