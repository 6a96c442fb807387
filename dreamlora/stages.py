"""The stages before training: images, class images, prompts and latents, each model freed after its use."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dreamlora.config import RunConfig
from dreamlora.data.cache import LatentStore, TensorCache, cache_folder
from dreamlora.data.encode import Filling, encode_dataset, encode_prompts
from dreamlora.data.images import ImageRecord
from dreamlora.data.transforms import Preparation
from dreamlora.interfaces import Components, Conditioning, Family, Latents, ModelSource, Role
from dreamlora.sampling.sampler import SamplePlan, plan_of
from dreamlora.training.stream import stack_conditioning

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROLES: tuple[Role, ...] = ("text", "vae", "denoiser", "scheduler")

MOST_TOKENIZED = 1000
"""Captions whose token ids stay in memory while the text encoder trains."""

Encode = Callable[[Sequence[str]], Conditioning]


class Parts:
    """Parts of the base pipeline, loaded when first asked for.

    Args:
        family: the plug-in that loads them.
        source: the pipeline.
        device: where they go.
        dtype: of the denoiser and the text encoders. The autoencoder is float32: in half precision some give NaN.
    """

    def __init__(self, family: Family, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        self.family = family
        self._source = source
        self._device = device
        self._dtype = dtype
        self._loaded: dict[Role, Components] = {}

    def get(self, role: Role) -> Components:
        """The part, on the device."""
        if role not in self._loaded:
            dtype = torch.float32 if role == "vae" else self._dtype
            self._loaded[role] = self.family.load(self._source, role, dtype)
        for module in self._loaded[role].values():
            if isinstance(module, nn.Module):
                module.to(self._device)
        return self._loaded[role]

    def free(self, *roles: Role) -> None:
        """Forget these parts; their memory is there for the next stage."""
        for role in roles:
            self._loaded.pop(role, None)
        gc.collect()
        give_back_memory()

    def pipeline(self) -> Any:
        """The whole base pipeline."""
        return self.family.pipeline({name: part for role in ROLES for name, part in self.get(role).items()})


def give_back_memory() -> None:
    """Return what has been freed to the device and the system; torch and the C library keep it otherwise."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class Stage:
    """What every stage works with.

    Attributes:
        timings: seconds by stage, for the report.
        warnings: what the person should know, for the report.
    """

    config: RunConfig
    accelerator: Accelerator
    family: Family
    source: ModelSource
    parts: Parts
    timings: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to the timings."""
        started = time.perf_counter()
        yield
        self.timings[name] = round(self.timings.get(name, 0.0) + time.perf_counter() - started, 2)

    def warn(self, text: str) -> None:
        """Tell the person now and in the report."""
        if self.accelerator.is_main_process:
            logger.warning(text)
        self.warnings.append(text)

    @property
    def cache(self) -> TensorCache:
        """Where latents and prompt embeddings are kept."""
        return TensorCache(cache_folder(self.config.data.latents_cache_dir))

    def filling(self, **key_parts: str | int | None) -> Filling:
        """How the cache is filled, with what decides an entry besides the image or the prompt itself."""
        return Filling(
            cache=self.cache,
            key_parts={"model": self.source.model_id, **key_parts},
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.config.data.dataloader_num_workers,
        )


def encode_images(stage: Stage, records: Sequence[ImageRecord], how: Preparation) -> LatentStore:
    """Latents of all images, made by the autoencoder where the cache lacks them."""

    def encode(pixels: Tensor) -> Latents:
        return stage.family.encode_images(stage.parts.get("vae"), pixels)

    store = encode_dataset(records, how, encode, stage.filling(dtype="float32"))
    stage.accelerator.wait_for_everyone()
    return store


def encode_texts(stage: Stage, prompts: Iterable[str]) -> Encode:
    """Prompts to embeddings, made by the text encoder where the cache lacks them; it is freed afterwards.

    A prompt that was not among ``prompts``, nor in the cache, is a UserError.
    """
    length = prompt_length(stage)

    def encode(texts: list[str]) -> Conditioning:
        text = stage.parts.get("text")
        return stage.family.encode_tokens(text, stage.family.tokenize(text, texts, length))

    table = encode_prompts(prompts, encode, stage.filling(dtype=stage.accelerator.mixed_precision, length=length))
    stage.accelerator.wait_for_everyone()
    stage.parts.free("text")
    return lambda captions: stack_conditioning([table[caption] for caption in captions])


def tokenized(stage: Stage, text: Components) -> Encode:
    """Prompts to token ids, for a text encoder that trains."""

    @functools.lru_cache(maxsize=MOST_TOKENIZED)
    def tokens(caption: str) -> Conditioning:
        return stage.family.tokenize(text, [caption], prompt_length(stage))

    return lambda captions: stack_conditioning([tokens(caption) for caption in captions])


def prompt_length(stage: Stage) -> int | None:
    """Tokens of a prompt, by the option that the family goes by."""
    length: int | None = getattr(stage.config.data, stage.family.PROMPT_LENGTH)
    return length


def pipeline_inputs(stage: Stage, encode: Encode, text: Components | None) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Prompts to keyword arguments of the pipeline: embeddings on the device, with negative ones under guidance.

    Args:
        stage: for device, options and family.
        encode: prompts to embeddings, or to token ids.
        text: the text components, if a text encoder trains.
    """
    device = stage.accelerator.device
    guided = (stage.config.sample.sample_guidance_scale or 0) > 1

    def embed(prompts: Sequence[str]) -> Conditioning:
        encoded = {name: value.to(device) for name, value in encode(prompts).items()}
        return stage.family.encode_tokens(text, encoded) if text else encoded

    def arguments(prompts: Sequence[str]) -> dict[str, Any]:
        negative = embed([stage.config.sample.negative_prompt or ""] * len(prompts)) if guided else None
        return dict(stage.family.call_arguments(embed(prompts), negative))

    return arguments


def sample_plan(stage: Stage, prompts: tuple[str, ...]) -> SamplePlan:
    """How these prompts are drawn, by the run's flags."""
    data = stage.config.data
    return plan_of(stage.config.sample, stage.family.SAMPLE_DEFAULTS, prompts, data.resolution, data.sample_batch_size)
