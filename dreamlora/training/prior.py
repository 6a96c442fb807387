"""Images of the class for prior preservation: a person's, and those that the base model makes."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from dreamlora.data.catalog import RecordSubset
from dreamlora.data.folder import Images, load_folder
from dreamlora.data.images import FORMATS, holds_images
from dreamlora.errors import UserError
from dreamlora.files import make_folder, replacing, writing
from dreamlora.sampling.sampler import Drawn, SampleItem, SamplePlan

FLAG = "--class_data_dir"
Drawer = Callable[[Sequence[SampleItem]], Sequence[Drawn]]
_OURS = re.compile(r"(\d{5,})-([0-9a-f]{8})\.png")


@dataclass(frozen=True)
class ClassImages:
    """What lies in a folder of class images.

    A person's images all count, however many; those that the base model made fill up what is missing to the number that
    there should be, the first ones first.

    Attributes:
        images: of the folder, and what else lies there; None if there are none yet.
        own: rows of a person's images.
        made: rows of the base model's images that count.
        surplus: how many more of these there are, from a run that wanted more.
        missing: images that are still to be made.
    """

    images: Images | None
    own: tuple[int, ...]
    made: tuple[int, ...]
    surplus: int
    missing: tuple[SampleItem, ...]

    @property
    def rows(self) -> list[int]:
        """All that count, in the order of the folder."""
        return sorted(self.own + self.made)

    @property
    def counted(self) -> RecordSubset:
        """The images that count."""
        return RecordSubset(self.images.records if self.images else (), self.rows)


def find_class_images(folder: Path, plan: SamplePlan, model_id: str = "") -> ClassImages:
    """Look at a folder of class images. Nothing is opened or written.

    Images of other processes may appear meanwhile. They change nothing, since only a person's images decide how many
    are needed, and an index is missing or not by its own file alone.

    Args:
        folder: of the class images.
        plan: one prompt, and as ``num_images_per_prompt`` how many images there should be.
        model_id: of the base model; part of the file names, like the plan.

    Raises:
        UserError: see ``load_folder``; the folder holds class images of another prompt, model or size, or images in
            sub-folders alone.
    """
    if len(plan.prompts) != 1:
        raise ValueError(f"class images have one prompt (got {len(plan.prompts)})")
    if not holds_images(folder, FLAG):
        _refuse_sub_folders(folder)
        return ClassImages(None, (), (), 0, tuple(plan.items()))
    images = load_folder(folder, plan.prompts[0], flag=FLAG)
    mark = fingerprint(plan, model_id)
    own: list[int] = []
    made: dict[int, int] = {}
    for row, record in enumerate(images.records):
        match = _OURS.fullmatch(record.name)
        if match and match[2] != mark:
            raise UserError(
                f"{folder} holds class images made with another model, prompt or size ({record.name}): "
                f"give another {FLAG}, or empty it"
            )
        if not match:
            own.append(row)
        elif (folder / record.name).stat().st_size:  # one of length 0 is what a power failure leaves behind
            made[int(match[1])] = row
    wanted = plan.items()[: max(plan.num_images_per_prompt - len(own), 0)]
    counted = tuple(made[item.image_index] for item in wanted if item.image_index in made)
    missing = tuple(item for item in wanted if item.image_index not in made)
    return ClassImages(images, tuple(own), counted, len(made) - len(counted), missing)


def make_class_images(
    folder: Path,
    plan: SamplePlan,
    make_drawer: Callable[[], Drawer],
    model_id: str = "",
    rank: int = 0,
    world: int = 1,
) -> int:
    """Make the class images that are missing in ``folder``.

    Image ``i`` has seed ``plan.seed + i`` and a name that begins with ``i``, and belongs to process ``i % world``. So a
    killed run goes on where it was, with the images it would have made, and processes need not agree on anything
    while they work; the caller waits for all of them before it reads the folder.

    Args:
        folder: see ``find_class_images``, as for plan and model_id.
        make_drawer: loads the base model, and gives what draws a batch of the plan; called only if this process has
            work. The caller frees it.

    Returns:
        How many images this process made.

    Raises:
        UserError: see ``find_class_images``; the folder cannot be written to; or an image came out black or not finite.
    """
    found = find_class_images(folder, plan, model_id)
    missing = [item for item in found.missing if item.image_index % world == rank]
    if not missing:
        return 0
    _require_writable(folder)
    mark = fingerprint(plan, model_id)
    draw = make_drawer()
    with tqdm(total=len(missing), desc="class images", unit="image", disable=rank != 0) as bar:
        for batch in _batches(missing, plan.batch_size):
            for drawn in draw(batch):
                if drawn.problem:
                    raise _broken(drawn.problem, plan.prompts[0])
                with replacing(folder / f"{drawn.item.image_index:05d}-{mark}.png") as temporary:
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


def _refuse_sub_folders(folder: Path) -> None:
    """Images of a person's in there would be passed over, and others made in their place."""
    below = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in FORMATS and file.is_file())
    if (file := next(below, None)) is not None:
        raise UserError(
            f"{FLAG} {folder} holds images only in sub-folders, which are not searched: give {file.parent}, or an "
            "empty folder to have class images made"
        )


def _require_writable(folder: Path) -> None:
    """Before a model is loaded."""
    make_folder(folder)
    with writing(folder), tempfile.TemporaryFile(dir=folder):
        pass


def _batches(items: list[SampleItem], size: int) -> Iterator[list[SampleItem]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _broken(problem: str, prompt: str) -> UserError:
    return UserError(
        f'a class image of "{prompt}" came out {problem}: try --prior_generation_precision fp32, or put images of the '
        f"class into --class_data_dir yourself"
    )
