"""What is trained on and what is held out."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from dreamlora.config import Data
from dreamlora.data.folder import Images, load_folder
from dreamlora.data.hub import load_hub
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError

FEWEST_TO_SPLIT = 6
MOST_HELD_OUT = 16


def load_images(data: Data, cache_dir: Path | None = None, progress: bool = False) -> Images:
    """The images that ``data`` names, from a folder or from Hugging Face ``datasets``, and what was skipped.

    Every file is read and hashed here, so that one that is no image is found before a model is loaded. Of ``data``'s
    options ``max_train_samples`` is applied; ``repeats`` is not: it changes the length of an epoch, not the images.

    Args:
        data: the options.
        cache_dir: where downloads of ``datasets`` are kept.
        progress: show a bar.

    Raises:
        UserError: see ``load_folder`` and ``load_hub``; or a file is no image.
    """
    if data.dataset_name:
        found = Images(load_hub(data, cache_dir))
    elif data.instance_data_dir:
        found = load_folder(data.instance_data_dir, data.instance_prompt, data.caption_column)
    else:
        raise UserError("nothing to train on: give --instance_data_dir, --dataset_name or --subject")
    records = found.records[: data.max_train_samples]
    for record in tqdm(records, desc="reading images", unit="image", delay=3, leave=False, disable=not progress):
        _ = record.facts
    return Images(records, found.skipped)


def split_holdout(records: list[ImageRecord], holdout: int | None) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """``(train, held_out)``, both in the order of ``records``.

    The images with the smallest hashes are held out. So the choice depends on what the images show, not on their names
    or order; adding one image changes it by at most one or two; and copies of an image never lie on both sides (they
    count as one, so ``held_out`` may be longer than the number asked for).

    Args:
        records: all images.
        holdout: how many different images to hold out; None: a fifth of them, at most 16, none of fewer than 6.

    Raises:
        UserError: ``holdout`` leaves nothing to train on.
    """
    different = sorted({record.content_hash() for record in records})
    if holdout is None:
        holdout = min(MOST_HELD_OUT, len(different) // 5) if len(different) >= FEWEST_TO_SPLIT else 0
    if holdout and holdout >= len(different):
        raise UserError(f"--holdout {holdout} leaves nothing to train on: there are {len(different)} different images")
    chosen = set(different[:holdout])
    train = [record for record in records if record.content_hash() not in chosen]
    return train, [record for record in records if record.content_hash() in chosen]
