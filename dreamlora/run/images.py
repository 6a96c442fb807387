"""Images and prompts of a run: read, drawn or generated, and split into those to learn and those to measure on."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dreamlora.cache_folder import cache_folder
from dreamlora.config import Data
from dreamlora.data.catalog import hash_prefixes
from dreamlora.data.dataset import examine, split_holdout
from dreamlora.data.images import ImageRecord, open_image
from dreamlora.data.sets import load_sets
from dreamlora.data.transforms import Preparations, enlargement
from dreamlora.errors import UserError
from dreamlora.models.parts import DTYPES, ROLES, Parts, watch
from dreamlora.processes import main_first, wait_for_everyone
from dreamlora.run.context import RunContext
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.prompts import read_prompts, sample_prompts
from dreamlora.sampling.sampler import SamplePlan, draw_batch, embedding
from dreamlora.sampling.shown import Shown, require_for_prompts, shown_with
from dreamlora.training import prior
from dreamlora.training.prompt_encoder import PromptEncoder

SUBJECT_IMAGES = 40
"""Images drawn of a built-in subject; a fifth of them is held out."""
STYLE_IMAGES = 96
"""Images drawn in a built-in style; 16 of them are held out."""
CAPTIONS_DRAWN = 4
"""Captions that become sample prompts where no prompt is given."""
MOST_EVAL_IMAGES = 16
"""Training images measured on, for the gap or where none is held out; more would cost time in every measurement."""
CLASS_SEED = 0
"""Of the first class image; not the run's seed, so that runs with other seeds share the class images."""


@dataclass(frozen=True)
class RunImages:
    """The images and prompts of a run.

    Attributes:
        train: to learn.
        held_out: to measure on; empty if there are too few images.
        classes: for prior preservation.
        prompts: of the samples; empty if none are drawn.
        eval_prompts: of images that are drawn for metrics alone; empty if there are none.
    """

    train: Sequence[ImageRecord]
    held_out: Sequence[ImageRecord]
    classes: Sequence[ImageRecord]
    prompts: tuple[str, ...]
    eval_prompts: tuple[str, ...] = ()

    @property
    def measured(self) -> Sequence[ImageRecord]:
        """What the evaluation loss is measured on."""
        return self.held_out or self.train[:MOST_EVAL_IMAGES]

    @property
    def learned(self) -> Sequence[ImageRecord]:
        """Training images that are measured for the gap; none where the evaluation itself is about training images."""
        return self.train[:MOST_EVAL_IMAGES] if self.held_out else []


def read_images(context: RunContext, folder: RunFolder) -> RunImages:
    """Images to learn and to measure on, and the prompts to draw; a file that is no image stops the run here."""
    data, main = context.config.data, context.accelerator.is_main_process
    if not data.brings_images:
        data = _draw_built_in(context, folder)
    with main_first():
        images = load_sets(data, context.config.model.cache_dir, progress=main)
    for note in images.notes:
        context.warn(note)
    training, held_out = split_holdout(images.records, data.holdout)
    side = data.resolution or 0
    how = Preparations.of(data, side, context.config.train.seed)
    _warn_of_quality(context, "images", [(training, how), (held_out, how.fixed(side))])
    if not held_out and context.config.eval.eval_steps != 0:
        context.warn(
            "no image could be held out: the evaluation loss is that of training images and cannot see overfitting"
        )
    sample = context.config.sample
    captions = [record.caption for record in (held_out or training)[:CAPTIONS_DRAWN]]
    prompts: tuple[str, ...] = ()
    if sample.sample_steps != 0:
        prompts = sample_prompts(sample, context.subject, captions)
    eval_prompts = _eval_prompts(context, captions) if context.config.draws_for_metrics else ()
    context.shown = _shown(context, (*prompts, *eval_prompts), held_out or training)
    return RunImages(training, held_out, [], prompts, eval_prompts)


def _shown(context: RunContext, prompts: Sequence[str], records: Sequence[ImageRecord]) -> Shown:
    """The image that each prompt edits: as given, else those before the edit of the images, in their order."""
    given = context.config.sample.validation_images
    require_for_prompts(given, prompts)
    if given:
        images = [open_image(file, f"--validation_images {file}") for file in given]
    else:
        images = [record.conditioning.open() for record in records[: len(prompts)] if record.conditioning]
    return shown_with(prompts, images, context.config.data.resolution or 0)


def for_classes(context: RunContext) -> Preparations:
    """How class images are prepared: as one data set, by the flags alone."""
    data = replace(context.config.data, datasets=())
    return Preparations.of(data, data.resolution or 0, context.config.train.seed)


def _warn_of_quality(
    context: RunContext, what: str, groups: Sequence[tuple[Sequence[ImageRecord], Preparations]]
) -> None:
    """Tell of images that are too small, and of colour profiles that cannot be used."""
    enlarged = unused = 0
    largest, smallest, odd = 1.0, "", ""
    for record, how in ((record, how) for records, how in groups for record in records):
        facts = record.facts
        factor = enlargement(facts.size, how[record].target(facts.size))
        enlarged += factor > 1
        if factor > largest:
            largest, smallest = factor, f"{record.name}, {facts.size[0]} x {facts.size[1]} pixels"
        unused += facts.profile_unused
        odd = odd or (record.name if facts.profile_unused else "")
    total = sum(len(records) for records, _ in groups)
    if enlarged:
        context.warn(
            f"{enlarged} of {total} {what} are smaller than what they are trained at and get enlarged, at most "
            f"{math.ceil(largest * 100) / 100:.3g} times ({smallest}): their blur is learned. Use larger ones, or a "
            f"--resolution below {context.config.data.resolution}"
        )
    if unused:
        context.warn(
            f"{unused} of {total} {what} have a colour profile that is damaged or of another kind of image, such as "
            f"{odd}: their colours are taken for sRGB"
        )


def _eval_prompts(context: RunContext, captions: Sequence[str]) -> tuple[str, ...]:
    """The prompts of images for metrics: of their own file, else those of the samples."""
    file = context.config.eval.eval_prompts
    if file:
        return read_prompts(file, context.subject)
    return sample_prompts(context.config.sample, context.subject, captions)


def _draw_built_in(context: RunContext, folder: RunFolder) -> Data:
    """Images of a built-in subject or style of the embedded models, as files, so that they go the way of a person's."""
    data, images = context.config.data, folder.instance_images
    if context.accelerator.is_main_process:
        from dreamlora.tiny import styles, subjects

        if data.style is not None:
            styles.write_images(images, data.style, STYLE_IMAGES)
        elif data.subject is not None:
            subjects.write_instance_images(images, data.subject, SUBJECT_IMAGES)
    wait_for_everyone()
    return replace(data, train_data_dir=images) if data.style else replace(data, instance_data_dir=images)


def class_plan(context: RunContext, class_prompt: str) -> SamplePlan:
    """How class images are drawn: as the samples, but for the run's own seed and negative prompt."""
    return replace(
        context.sample_plan((class_prompt,)),
        num_images_per_prompt=context.config.data.num_class_images,
        seed=CLASS_SEED,
        negative_prompt=context.family.sample_defaults(context.source).negative_prompt,
    )


def with_class_images(context: RunContext, folder: RunFolder, pictures: RunImages) -> RunImages:
    """Class images for prior preservation, made by the base model where they are missing.

    Those that are there are looked at before it is loaded.
    """
    data = context.config.data
    if not data.with_prior_preservation or data.class_prompt is None:
        return pictures
    images = class_folder(context, folder)
    precision = data.prior_generation_precision or context.accelerator.mixed_precision
    plan = class_plan(context, data.class_prompt)
    found = _class_images(context, images, plan, pictures)
    context.tell(_what_is_found(images, found))
    base = Parts(context.family, context.source, context.accelerator.device, DTYPES[precision])
    watch(context.memory, base)
    rank, world = context.accelerator.process_index, context.accelerator.num_processes

    def drawer() -> prior.Drawer:
        encode = PromptEncoder(base, length=None)
        guidance = context.guidance(plan.negative_prompt)
        asked = embedding(guidance, encode)
        encode.prepare(guidance.encoded(plan.prompts))
        base.free("text")
        loaded = base.drawer()
        return lambda items: draw_batch(loaded, plan, items, asked)

    with context.timed("class images"):
        prior.make_class_images(images, plan, drawer, context.source.drawer_id, rank, world)
        base.free(*ROLES)
        wait_for_everyone()
    found = _class_images(context, images, plan, pictures)
    for note in found.images.notes if found.images else ():
        context.warn(note)
    _warn_of_quality(context, "class images", [(found.counted, for_classes(context))])
    return replace(pictures, classes=found.counted)


def _class_images(context: RunContext, folder: Path, plan: SamplePlan, pictures: RunImages) -> prior.ClassImages:
    """What is in the folder, decoded once.

    Raises:
        UserError: see ``prior.find_class_images`` and ``examine``; or there are images to learn among them.
    """
    found = prior.find_class_images(folder, plan, context.source.drawer_id)
    if found.images is None:
        return found
    with main_first():
        cache = cache_folder(context.config.data.latents_cache_dir)
        examine(found.images.records, cache, context.accelerator.is_main_process, found.rows)
    to_learn = itertools.chain(pictures.train, pictures.held_out)
    shared = np.flatnonzero(np.isin(hash_prefixes(found.counted), hash_prefixes(to_learn)))
    if len(shared):
        first = found.counted[int(shared[0])].where
        raise UserError(
            f"{len(shared)} of {len(found.counted)} class images are images to learn as well, such as {first}: what "
            "they show would be learned as the class. Take them out of one of the two folders"
        )
    return found


def _what_is_found(folder: Path, found: prior.ClassImages) -> str:
    new = "" if folder.exists() else " (a new folder)"
    counts = {
        "of your own": len(found.own),
        "made before": len(found.made),
        "made before that are more than --num_class_images asks for and do not count": found.surplus,
        "made now": len(found.missing),
    }
    return f"class images in {folder}{new}: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n)


def class_folder(context: RunContext, folder: RunFolder) -> Path:
    """Where the class images of a run lie: where it was told to, or in ``class_images/<prompt>-<hash>`` beside its
    folder, where other prompts, models and sizes have folders of their own.
    """
    if context.config.data.class_data_dir:
        return context.config.data.class_data_dir
    prompt = context.config.data.class_prompt or ""
    kind = f"{prompt}/{context.source.drawer_id}/{context.config.data.resolution}"
    slug = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:40]
    return folder.path.parent / "class_images" / f"{slug}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
