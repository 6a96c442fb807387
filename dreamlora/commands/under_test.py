"""The base model, and the LoRAs that are put into it one after the other: what ``sample`` and ``evaluate`` work on.

It computes as the first run did while it trained: in the same precision, with LoRAs in float32 under autocast, and with
prompts of the same number of tokens, each encoded by itself. So a LoRA gives the images and the loss that its run saw.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dreamlora import precision
from dreamlora.commands.row_tokens import RowTokens, tokens_of
from dreamlora.commands.rows import Row
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.commands.trained import (
    COMPUTED_WITH,
    TrainedRun,
    differences,
    dtype_of,
    refuse_other_predictions,
    settings_of,
    source_of,
)
from dreamlora.interfaces import Conditioning, ModelSource, SampleDefaults
from dreamlora.lora.applying import apply_lora
from dreamlora.lora.names import names_of
from dreamlora.lora.pairs import is_adapted
from dreamlora.memory import StageMemory
from dreamlora.models.loading import family_of
from dreamlora.models.new_tokens import put_for_a_while
from dreamlora.models.parts import Parts, computing_in, watch
from dreamlora.models.prompts import cut_prompts
from dreamlora.models.tf32 import set_tf32
from dreamlora.sampling.sampler import Asked, Guidance, SamplePlan, embedding
from dreamlora.training.prompt_encoder import PromptEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnderTest:
    """The base model and LoRAs that are drawn with or measured.

    Attributes:
        settings: options of the first run among them, by flag; see ``settings_of``.
        rows: the base model first.
        source, parts: the model.
        dtype: of denoiser and text encoders.
        notes: by a row's label, what of its run is not as it is done here.
        tokens: by a row's label, the new tokens that its prompts may have.
        memory: that the stages take.
        encode: captions, and what belongs to their images, to conditioning, by the text encoders as they are now.
    """

    settings: dict[str, Any]
    rows: Sequence[Row]
    source: ModelSource
    parts: Parts
    dtype: torch.dtype
    notes: dict[str, list[str]]
    tokens: dict[str, RowTokens]
    encode: PromptEncoder
    memory: StageMemory

    @contextmanager
    def applied(self, row: Row, asked: Iterable[tuple[Sequence[str], Conditioning]]) -> Iterator[Any]:
        """A pipeline with the row's LoRA and new tokens, which draws from embeddings; afterwards the model is without.

        Args:
            row: whose LoRA.
            asked: arguments of ``encode``: all that is encoded before the denoiser comes.
        """
        with self.memory.stage("loading the model"):
            whole, text, family = self.parts.resting_pipeline(), self.parts.text, self.parts.family
        vectors = self.tokens[row.label].vectors(text, family)
        with put_for_a_while(text, vectors):
            if row.lora is not None:
                apply_lora(whole, row.lora, row.scale, names_of(family, getattr(whole, family.DENOISER).config))
            of_its_own = bool(vectors) or any(map(is_adapted, text.values()))
            if of_its_own:
                self.encode.forget()
            try:
                with self.memory.stage("encoding prompts"):
                    self.encode.prepare(asked)
                with self.memory.stage("loading the model"):
                    pipeline = self.parts.drawer()
                yield pipeline
            finally:
                if of_its_own:
                    self.encode.forget()
                whole.unload_lora_weights()

    def drawing(self, row: Row, plan: SamplePlan, prompts: Iterable[str]) -> AbstractContextManager[Any]:
        """A pipeline with the row's LoRA and new tokens, to draw images of a plan with these of its prompts."""
        return self.applied(row, self._guidance(plan).encoded(prompts))

    def computing(self) -> AbstractContextManager[Any]:
        """In here the denoiser computes as in training."""
        return computing_in(self.dtype, self.parts.device)

    def warn_of_cut(self, texts: Sequence[str]) -> None:
        """Tell how many of these are longer than the text encoder reads."""
        counts = {token: count for row in self.tokens.values() for token, count in row.counts.items()}
        limit, cut = cut_prompts(self.parts.family, self.source, texts, self.prompt_length, counts)
        if count := sum(cut):
            logger.warning(
                "%d of %d prompts have more than %d tokens: the rest does not count", count, len(texts), limit
            )

    def warn_of_negative(self, plan: SamplePlan) -> None:
        """Tell of a negative prompt that the pipeline does not look at."""
        if plan.negative_prompt and self._guidance(plan).encoded_negative is None:
            logger.warning(
                "the negative prompt has no effect: this model is not guided away from one at guidance %g",
                plan.guidance_scale,
            )

    def asked(self, plan: SamplePlan) -> Asked:
        """What gives a pipeline the prompt embeddings of a plan's images."""
        return embedding(self._guidance(plan), self.encode)

    def _guidance(self, plan: SamplePlan) -> Guidance:
        return Guidance(self.parts.family, self.source, plan.guidance_scale, plan.negative_prompt, plan.shown)

    @property
    def sample_defaults(self) -> SampleDefaults:
        """How the model draws unless told otherwise."""
        return self.parts.family.sample_defaults(self.source)

    @property
    def edits(self) -> bool:
        """Whether the model edits images."""
        return self.parts.family.shows_images(self.source)

    @property
    def must_edit(self) -> bool:
        """Whether it does nothing without an image."""
        return self.parts.family.text_pictures(self.source) is not None

    @property
    def prompt_length(self) -> int | None:
        """Tokens of a prompt; None: the family's."""
        length: int | None = self.settings.get(self.parts.family.PROMPT_LENGTH)
        return length

    @property
    def precision(self) -> str:
        """Such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def made_of(self) -> dict[str, Any]:
        """What decides an image besides LoRA and plan, as JSON can say it."""
        elsewhere = self.parts.text_device != self.parts.device
        return {
            "model": self.source.drawer_id,
            "precision": self.precision,
            "prompt_length": self.prompt_length,
            "text_in_autocast": _text_trained(self.settings),
            "tf32": bool(self.settings.get("allow_tf32")),
            **({"text_encoder_device": self.parts.text_device.type} if elsewhere else {}),
        }


def _text_trained(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("train_text_encoder") or settings.get("new_tokens"))


def prepared(
    config: SampleConfig, rows: Sequence[Row], run: TrainedRun | None, memory: StageMemory, options: Sequence[str]
) -> UnderTest:
    """All rows in one model; nothing is loaded yet, but that GPUs round from now on as they did in the run.

    Args:
        config: the flags.
        rows: with labels of their own.
        run: whose options hold where the flags leave something open.
        memory: of the program, on the device of the model.
        options: of a run that decide about what the rows are for: DRAWN_WITH, MEASURED_WITH.

    Raises:
        UserError: there is no such model, or no model fits all LoRAs; or embeddings of new tokens are damaged, or for
            another kind of model.
    """
    settings = settings_of(config, run)
    source = source_of(config, run)
    precision.require("base_precision", source.base_precision, memory.device.type)
    precision.require(
        "text_encoder_precision", source.text_encoder_precision, source.text_encoder_device or memory.device.type
    )
    family = family_of(source, config.family or settings.get("family"))
    refuse_other_predictions([row.run for row in rows if row.run], source)
    notes = {}
    if run:
        options = (*COMPUTED_WITH, family.PROMPT_LENGTH, *options)
        notes = {row.label: differences(row.run, run, config, source, options) for row in rows if row.run}
        for note in dict.fromkeys(note for row_notes in notes.values() for note in row_notes):
            logger.warning(note)
    set_tf32(bool(settings.get("allow_tf32")))
    dtype = dtype_of(config, settings, memory.device)
    tokens = {row.label: tokens_of(row, config.embeddings, settings, family) for row in rows}
    trained, device = _text_trained(settings), memory.device
    parts = Parts(family, source, device, dtype, family.TEXT_ENCODERS if trained and source.text_encoder_device else ())
    watch(memory, parts)
    computing = partial(computing_in, dtype, device)
    encode = PromptEncoder(parts, settings.get(family.PROMPT_LENGTH), computing if trained else None)
    return UnderTest(settings, rows, source, parts, dtype, notes, tokens, encode, memory)
