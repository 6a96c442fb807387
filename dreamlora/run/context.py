"""What every stage of a run works with: options, processes, model; and where its timings and warnings are kept."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dreamlora.cache_folder import cache_folder
from dreamlora.callbacks.trackers import RunTracker
from dreamlora.config import RunConfig
from dreamlora.data.cache import TensorCache
from dreamlora.data.captions import CaptionPlan
from dreamlora.data.encode import Filling
from dreamlora.eval_loss.price import Price
from dreamlora.interfaces import Family, ModelSource
from dreamlora.lora.continuing import Predecessor
from dreamlora.memory import StageMemory
from dreamlora.models.adapter import content_of
from dreamlora.models.inventory import PartFiles
from dreamlora.models.new_tokens import TokenEmbeddings
from dreamlora.models.parts import Parts, watch
from dreamlora.sampling.limits import CallLimits
from dreamlora.sampling.prompts import Subject
from dreamlora.sampling.sampler import Guidance, SamplePlan, plan_of
from dreamlora.sampling.shown import Shown

logger = logging.getLogger(__name__)


@dataclass
class RunContext:
    """What every stage of a run works with.

    Attributes:
        inventory: the parts of the model, as they lie on disk or on the hub.
        predecessor: the LoRA that training goes on from.
        training_adapter: file of the frozen LoRA that is active while training.
        eval_price: of the evaluation loss, once it is known how often it is measured.
        new_tokens: their embeddings by text encoder, once they are put in.
        base_bits: ``parity.bits_of`` the denoiser before anything was put into it, where the check at the end needs it.
        shown: the images that the prompts of samples edit, once they are known; empty for models that do not edit.
        trackers: on the main process, once they have started.
        limits: what a call of the pipeline may take.
        chosen: options that ``--vram`` decided.
        open_rates: options that have the rate of a run without a range test, until that gives them another.
        timings: seconds by stage, for the report.
        memory: that the stages take.
        warnings: what the person should know, for the report.
    """

    config: RunConfig
    accelerator: Accelerator
    family: Family
    source: ModelSource
    parts: Parts
    inventory: Sequence[PartFiles] = ()
    predecessor: Predecessor | None = None
    training_adapter: Path | None = None
    eval_price: Price | None = None
    new_tokens: dict[str, TokenEmbeddings] = field(default_factory=dict)
    base_bits: int | None = None
    shown: Shown = field(default_factory=dict)
    trackers: list[RunTracker] = field(default_factory=list)
    limits: CallLimits = field(default_factory=CallLimits)
    chosen: dict[str, Any] = field(default_factory=dict)
    open_rates: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = StageMemory(self.accelerator.device)
        watch(self.memory, self.parts)
        self.limits.tiles = self.config.model.vae_tiling

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to the timings, and count its memory."""
        started = time.perf_counter()
        with self.memory.stage(name):
            yield
        self.timings[name] = round(self.timings.get(name, 0.0) + time.perf_counter() - started, 2)

    def tell(self, text: str) -> None:
        """Tell the person now."""
        if self.accelerator.is_main_process:
            logger.info(text)

    def warn(self, text: str, details: str = "") -> None:
        """Tell the person now and in the report, and there with details that are too long for a terminal."""
        if self.accelerator.is_main_process:
            logger.warning(text)
        self.warnings.append(f"{text}{details}")

    @property
    def caption_plan(self) -> CaptionPlan:
        """Which caption is seen when. One that is dropped becomes what the pipeline is guided away from unless told
        otherwise, which some families encode otherwise than a prompt.
        """
        nothing = self.family.negative_prompt(self.source, math.inf, None)
        return CaptionPlan.of(self.config.data, self.config.train.seed, dropped=nothing or "")

    @property
    def subject(self) -> Subject:
        """What is learned, as the options name it."""
        return Subject.of(self.config.data.subject_prompt, self.config.data.class_prompt)

    @property
    def measured_id(self) -> str:
        """How the evaluation loss names the model that it is measured in, training adapter included."""
        model = self.source.predictor_id
        return f"{model} with the training adapter {self.adapter_content}" if self.training_adapter else model

    @cached_property
    def adapter_content(self) -> str | None:
        """What the training adapter's file holds, in a few digits; None: there is none."""
        return content_of(self.training_adapter) if self.training_adapter else None

    @property
    def cache(self) -> TensorCache:
        """Where latents and prompt embeddings are kept."""
        return TensorCache(cache_folder(self.config.data.latents_cache_dir))

    def filling(self, **key_parts: str | int | None) -> Filling:
        """How the cache is filled, with what decides an entry besides the image or the prompt itself."""
        rounding = {"tf32": 1} if self.config.model.allow_tf32 else {}
        return Filling(
            cache=self.cache,
            key_parts={"model": self.source.model_id, **rounding, **key_parts},
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.data.dataloader_num_workers,
        )

    def sample_plan(self, prompts: tuple[str, ...]) -> SamplePlan:
        """How these prompts are drawn, by the run's flags."""
        data = self.config.data
        defaults = self.family.sample_defaults(self.source)
        plan = plan_of(self.config.sample, defaults, prompts, data.resolution, data.sample_batch_size)
        return replace(
            plan, limits=self.limits, shown={prompt: image for prompt, image in self.shown.items() if prompt in prompts}
        )

    def guidance(self, negative: str | None) -> Guidance:
        """How samples are guided, by the run's flags.

        Args:
            negative: the negative prompt; None: the pipeline's own.
        """
        scale = self.config.sample.sample_guidance_scale or 0
        return Guidance(self.family, self.source, scale, negative, self.shown)
