"""Images of the class, made by the base model, for prior preservation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dreamlora.data.images import FORMATS
from dreamlora.errors import UserError
from dreamlora.files import make_folder, replacing
from dreamlora.sampling.sampler import SampleItem, SamplePlan, draw_batch

_OURS = re.compile(r"(\d{5,})-([0-9a-f]{8})\.png")


def ensure_class_images(
    folder: Path,
    plan: SamplePlan,
    make_pipeline: Callable[[], Any],
    model_id: str = "",
    rank: int = 0,
    world: int = 1,
) -> int:
    """Make the class images that are missing in ``folder``; images that a person put there count.

    Image ``i`` has seed ``plan.seed + i`` and a name that begins with ``i``, and belongs to process ``i % world``. So a
    killed run goes on where it was, with the images it would have made, and processes need not agree on anything
    while they work; the caller waits for all of them before it reads the folder.

    Args:
        folder: of the class images.
        plan: one prompt, and as ``num_images_per_prompt`` how many images there should be.
        make_pipeline: loads the base model's pipeline on its device; called only if this process has work. The
            caller frees it.
        model_id: of the base model; part of the file names, like the plan.

    Returns:
        How many images this process made.

    Raises:
        UserError: the folder holds class images of another prompt, model or size; or an image came out black or not
            finite.
    """
    if len(plan.prompts) != 1:
        raise ValueError(f"class images have one prompt (got {len(plan.prompts)})")
    folder = make_folder(Path(folder))
    mark = fingerprint(plan, model_id)
    missing = [item for item in _missing(folder, plan, mark) if (item.seed - plan.seed) % world == rank]
    if not missing:
        return 0
    pipeline = make_pipeline()
    with tqdm(total=len(missing), desc="class images", unit="image", disable=rank != 0) as bar:
        for batch in _batches(missing, plan.batch_size):
            for drawn in draw_batch(pipeline, plan, batch):
                if drawn.problem:
                    raise _broken(drawn.problem, plan.prompts[0])
                with replacing(folder / _name(drawn.item.seed - plan.seed, mark)) as temporary:
                    drawn.image.save(temporary)
            bar.update(len(batch))
    return len(missing)


def fingerprint(plan: SamplePlan, model_id: str) -> str:
    """Eight hex digits of what class images must have in common: model, prompts and size.

    Not of seed, denoising steps and guidance: images made with others may join, so that a run with other options for
    its samples does not need class images of its own.
    """
    kind = [model_id, plan.prompts, plan.negative_prompt, plan.width, plan.height]
    return hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:8]


def _name(index: int, mark: str) -> str:
    return f"{index:05d}-{mark}.png"


def _missing(folder: Path, plan: SamplePlan, mark: str) -> list[SampleItem]:
    """The images still to make. Temporary files have hidden names, so that halves never count.

    Images of other processes may appear while this one looks; they change nothing, since only a person's images
    decide how many are needed and an index is missing or not by its own file alone.
    """
    given = 0
    for file in sorted(folder.iterdir()):
        match = _OURS.fullmatch(file.name)
        if match and match[2] != mark:
            raise UserError(
                f"{folder} holds class images made with another model, prompt or size ({file.name}): "
                f"give another --class_data_dir, or empty it"
            )
        given += not match and not file.name.startswith(".") and file.suffix.lower() in FORMATS
    wanted = plan.items()[: max(plan.num_images_per_prompt - given, 0)]
    return [item for item in wanted if not _whole(folder / _name(item.seed - plan.seed, mark))]


def _whole(file: Path) -> bool:
    """Whether the file is there; one of length 0 is what a power failure leaves behind."""
    return file.exists() and file.stat().st_size > 0


def _batches(items: list[SampleItem], size: int) -> Iterator[list[SampleItem]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _broken(problem: str, prompt: str) -> UserError:
    return UserError(
        f'a class image of "{prompt}" came out {problem}: try --prior_generation_precision fp32, or put images of the '
        f"class into --class_data_dir yourself"
    )
