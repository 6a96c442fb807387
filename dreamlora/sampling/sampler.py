"""Prompts x seeds -> images, from any stock pipeline, without leaving a trace in it or in what trains.

Every image has a generator of its own, so it does not depend on the batch it is drawn in, nor on how many processes
share the work; and it stays comparable from step to step, because only the weights differ.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dreamlora.config import Sample
from dreamlora.errors import UserError, is_of_memory
from dreamlora.interfaces import PICTURE, Conditioning, Family, ModelSource, SampleDefaults
from dreamlora.models.tiling import one_by_one, replaced, tiled
from dreamlora.sampling.limits import CallLimits
from dreamlora.sampling.schedulers import deterministic
from dreamlora.sampling.shown import Shown, digest

logger = logging.getLogger(__name__)

Asked = Callable[[Sequence[str]], dict[str, Any]]
"""Prompts to keyword arguments of the pipeline: what is drawn, and with which guidance."""


@dataclass(frozen=True)
class Guidance:
    """How a family's pipeline is guided.

    Attributes:
        family: of the pipeline.
        source: of the pipeline.
        scale: as the pipeline's call counts it.
        negative: the negative prompt; None: the pipeline's own.
        shown: the image that each prompt edits; empty for models that do not edit.
    """

    family: Family
    source: ModelSource
    scale: float
    negative: str | None = None
    shown: Shown = field(default_factory=dict)

    def options(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of the call for these prompts, besides the prompts themselves."""
        options = self.family.call_options(self.scale)
        if not self.shown:
            return options
        [image] = [self.shown[prompt] for prompt in prompts]  # some read a list of images otherwise than one
        return {**options, "image": image}

    def views(self, prompts: Sequence[str]) -> Conditioning:
        """The pictures that the text encoder sees with these prompts; empty where it sees none."""
        picture = self.family.text_pictures(self.source)
        return {} if picture is None else {PICTURE: torch.stack([picture(self.shown[prompt]) for prompt in prompts])}

    def encoded(self, prompts: Iterable[str]) -> Iterator[tuple[list[str], Conditioning]]:
        """What ``embedding`` has encoded for these prompts."""
        for prompt in prompts:
            views = self.views([prompt])
            yield [prompt], views
            if self.encoded_negative is not None:
                yield [self.encoded_negative], views

    @property
    def encoded_negative(self) -> str | None:
        """What is encoded as the negative prompt; None: nothing is."""
        return self.family.negative_prompt(self.source, self.scale, self.negative)


def embedding(guidance: Guidance, encode: Callable[[Sequence[str], Conditioning], Conditioning]) -> Asked:
    """Ready prompt embeddings for a pipeline, in training and afterwards.

    Args:
        guidance: of the samples.
        encode: prompts, and what belongs to their images, to batched conditioning on the pipeline's device.
    """
    family, negative = guidance.family, guidance.encoded_negative

    def ask(prompts: Sequence[str]) -> dict[str, Any]:
        views = guidance.views(prompts)
        unwanted = None if negative is None else encode([negative] * len(prompts), views)
        return {**family.call_arguments(encode(prompts, views), unwanted), **guidance.options(prompts)}

    return ask


def prompting(guidance: Guidance) -> Asked:
    """Prompts as texts, for a pipeline whose own text encoders embed them, as a user's do."""

    def ask(prompts: Sequence[str]) -> dict[str, Any]:
        unwanted = {} if guidance.negative is None else {"negative_prompt": [guidance.negative] * len(prompts)}
        return {"prompt": list(prompts), **unwanted, **guidance.options(prompts)}

    return ask


@dataclass(frozen=True)
class SampleItem:
    """One image to draw.

    Attributes:
        prompt_index: column of the prompt, from 0.
        image_index: number among the prompt's images, from 0.
        prompt: the text.
        seed: of this image alone.
    """

    prompt_index: int
    image_index: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """File name without suffix, such as ``p00_s42``."""
        return f"p{self.prompt_index:02d}_s{self.seed}"


@dataclass(frozen=True)
class SamplePlan:
    """Which images are drawn, and how; the same plan gives the same noise at every step and for every optimizer.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance, or the embedded guidance of distilled models.
        seed: of the first image; the others count up from it.
        negative_prompt: part of what is asked of the pipeline; kept here as it decides the picture.
        batch_size: images per call of the pipeline; those that edit draw one by one, as some take all images that a
            call is given for parts of one motif.
        width: in pixels; None: the pipeline's own.
        height: in pixels; None: the pipeline's own.
        shown: the image that each prompt edits; empty for models that do not edit.
        limits: what a call may take; the plans of a program share it.
    """

    prompts: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    num_images_per_prompt: int = 1
    seed: int = 42
    negative_prompt: str | None = None
    batch_size: int = 4
    width: int | None = None
    height: int | None = None
    shown: Shown = field(default_factory=dict)
    limits: CallLimits = field(default_factory=CallLimits, compare=False)

    @property
    def at_once(self) -> int:
        """Images per call of the pipeline."""
        return 1 if self.shown else self.batch_size

    def items(self) -> list[SampleItem]:
        """Prompt by prompt; seeds ``seed, seed + 1, ...`` in that order."""
        count = self.num_images_per_prompt
        return [
            SampleItem(column, image, prompt, self.seed + column * count + image)
            for column, prompt in enumerate(self.prompts)
            for image in range(count)
        ]

    def picture_id(self, item: SampleItem, made_of: Mapping[str, Any] | None = None) -> str:
        """12 hex digits: other prompts, seeds or settings are other pictures, whatever their numbers.

        Args:
            item: of the plan.
            made_of: what decides the picture besides, as JSON can say it.
        """
        how = [self.num_inference_steps, self.guidance_scale, self.negative_prompt, self.width, self.height]
        of = [digest(self.shown[item.prompt])] if item.prompt in self.shown else []
        text = json.dumps([dict(made_of or {}), how, item.prompt, item.seed, *of], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def file_name(self, item: SampleItem, made_of: Mapping[str, Any] | None = None) -> str:
        """Such as ``p00_s42-1a2b3c4d5e6f.png``: no picture takes the place of another."""
        return f"{item.name}-{self.picture_id(item, made_of)}.png"


def plan_of(
    sample: Sample, defaults: SampleDefaults, prompts: Sequence[str], side: int | None, batch_size: int
) -> SamplePlan:
    """The plan that the options ask for.

    Args:
        defaults: of the family, for what the options leave open.
        side: of the square images, in pixels; None: the pipeline's own.
    """
    steps, guidance = sample.num_inference_steps, sample.sample_guidance_scale
    return SamplePlan(
        prompts=tuple(prompts),
        num_inference_steps=defaults.num_inference_steps if steps is None else steps,
        guidance_scale=defaults.guidance_scale if guidance is None else guidance,
        num_images_per_prompt=sample.num_validation_images or sample.num_images_per_prompt,
        seed=sample.sample_seed,
        negative_prompt=defaults.negative_prompt if sample.negative_prompt is None else sample.negative_prompt,
        batch_size=batch_size,
        width=side,
        height=side,
    )


@dataclass(frozen=True)
class Drawn:
    """One drawn image.

    Attributes:
        image: RGB; what was not finite is black.
        problem: "not finite" or "black", else None.
    """

    item: SampleItem
    image: Image.Image
    problem: str | None = None


def draw(pipeline: Any, plan: SamplePlan, asked: Asked, rank: int = 0, world: int = 1) -> Iterator[Drawn]:
    """Draw this process's share of the plan (every ``world``-th image).

    Every process calls the pipeline equally often, if need be for an image that is thrown away: a sharded model would
    wait for ever otherwise, and in the time of the slowest process it costs nothing.

    Args:
        pipeline: a stock diffusers pipeline; modules, scheduler and settings are put back after every batch.
        asked: what is drawn of a prompt (``embedding``, ``prompting``).
    """
    items = plan.items()
    share = items[rank::world]
    size = plan.at_once
    calls = math.ceil(math.ceil(len(items) / world) / size)
    for call in range(calls):
        batch = share[call * size : (call + 1) * size]
        drawn = draw_batch(pipeline, plan, batch or items[:1], asked)
        yield from drawn if batch else ()


def draw_batch(pipeline: Any, plan: SamplePlan, items: Sequence[SampleItem], asked: Asked) -> list[Drawn]:
    """Draw these images in one call of the pipeline; in several where memory does not suffice for that.

    Raises:
        UserError: fewer steps are asked for than the pipeline can draw in.
    """
    _refuse_single_step(pipeline, plan)
    drawn: list[Drawn] = []
    while len(drawn) < len(items):
        part = items[len(drawn) :][: plan.limits.images]
        try:
            drawn += _call(pipeline, plan, part, asked)
        except Exception as error:
            changed = plan.limits.lower(len(part), getattr(pipeline, "vae", None)) if is_of_memory(error) else ""
            if not changed:
                raise
            logger.info(changed)
    return drawn


def _call(pipeline: Any, plan: SamplePlan, items: Sequence[SampleItem], asked: Asked) -> list[Drawn]:
    """Draw these images in one call of the pipeline."""
    prompts = [item.prompt for item in items]
    options, vae = _size(pipeline, plan), getattr(pipeline, "vae", None)
    with _untouched(pipeline), one_by_one(vae), tiled(vae, plan.limits.tiles):
        pixels = pipeline(
            **asked(prompts),
            generator=[torch.Generator("cpu").manual_seed(item.seed) for item in items],
            num_inference_steps=plan.num_inference_steps,
            output_type="np",  # "pil" would turn NaN into black unseen
            **options,
        ).images
    return [_drawn(item, array) for item, array in zip(items, pixels, strict=True)]


def _size(pipeline: Any, plan: SamplePlan) -> dict[str, int]:
    """Of the images. Pipelines that would choose another one, in an area of their own, are kept from that."""
    size = {name: value for name in ("width", "height") if (value := getattr(plan, name)) is not None}
    if len(size) == 2:
        known = inspect.signature(pipeline.__call__).parameters
        own = {"max_area": size["width"] * size["height"], "_auto_resize": False}
        size |= {name: value for name, value in own.items() if name in known}
    return size


def _refuse_single_step(pipeline: Any, plan: SamplePlan) -> None:
    """Such a scheduler stretches the steps between the first, which is all noise, and the last: one alone gives NaN."""
    if plan.num_inference_steps == 1 and getattr(pipeline.scheduler.config, "shift_terminal", None):
        raise UserError(
            "--num_inference_steps 1: the model's scheduler (shift_terminal in its config) draws in 2 steps or more"
        )


def _drawn(item: SampleItem, pixels: np.ndarray) -> Drawn:
    """Pixels ``[H, W, 3]`` in [0, 1] as a picture, with what is wrong with it."""
    problem = None
    if not np.isfinite(pixels).all():
        problem = "not finite"
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=1.0, neginf=0.0)
    elif pixels.max() == 0:
        problem = "black"
    if problem:
        logger.warning("the sample of %r (seed %d) is %s", item.prompt, item.seed, problem)
    return Drawn(item, Image.fromarray((pixels * 255).round().astype(np.uint8)), problem)


@contextmanager
def _untouched(pipeline: Any) -> Iterator[None]:
    """Draw in here; afterwards pipeline, modules and torch's global random state are as they were."""
    scheduler, note = deterministic(pipeline.scheduler)
    if note:
        _say_once(note)
    with ExitStack() as stack:
        # Not inference mode: what a module caches under it (rotary tables, ...) would fail in the next training step.
        stack.enter_context(torch.no_grad())
        stack.enter_context(_forked_random_state())
        stack.enter_context(replaced(pipeline, "scheduler", scheduler))
        stack.enter_context(_evaluating(_modules(pipeline)))
        stack.enter_context(_silenced(pipeline))
        stack.enter_context(_in_own_precision(getattr(pipeline, "vae", None)))
        yield


@functools.cache
def _say_once(note: str) -> None:
    logger.info(note)


def _modules(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


@contextmanager
def _forked_random_state() -> Iterator[None]:
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode; afterwards every submodule has the mode it had (parts of a training model may be in eval mode)."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def _silenced(pipeline: Any) -> Iterator[None]:
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


@contextmanager
def _in_own_precision(vae: Any) -> Iterator[None]:
    """Keep autocast away from the autoencoder: in fp16 many overflow, and the images come out black."""
    if vae is None:
        yield
        return

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast(tensor.device.type, enabled=False):
                return original(tensor.to(vae.dtype), *args, **kwargs)

        return compute

    vae.encode, vae.decode = wrapped(vae.encode), wrapped(vae.decode)
    try:
        yield
    finally:
        del vae.encode, vae.decode
