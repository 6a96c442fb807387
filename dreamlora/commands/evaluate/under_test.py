"""What ``dreamlora evaluate`` measures: the base model, and the LoRAs that are put into it one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dreamlora.commands.evaluate.flags import EvaluateConfig
from dreamlora.commands.rows import Row, dtype_on, model_of, rows_of
from dreamlora.interfaces import ModelSource
from dreamlora.lora.files import apply_lora
from dreamlora.models.loading import family_of, resolve_source
from dreamlora.models.parts import Parts


@dataclass(frozen=True)
class UnderTest:
    """The base model and LoRAs that are measured.

    Attributes:
        config: with these LoRAs alone.
        settings: options of the first run among them, by flag; empty if there is none.
        rows: the base model first.
        source, parts: the model.
        dtype: of denoiser and text encoders.
    """

    config: EvaluateConfig
    settings: dict[str, Any]
    rows: Sequence[Row]
    source: ModelSource
    parts: Parts
    dtype: torch.dtype


def prepared(config: EvaluateConfig, settings: dict[str, Any], device: torch.device) -> UnderTest:
    """All LoRAs that ``config`` names; nothing is loaded yet.

    Raises:
        UserError: a LoRA is missing or damaged, or there is no such model.
    """
    source = resolve_source(model_of(config, settings))
    family = family_of(source, config.family or settings.get("family"))
    dtype = dtype_on(config, device)
    rows = _told_apart(rows_of(config))
    return UnderTest(config, settings, rows, source, Parts(family, source, device, dtype), dtype)


@contextmanager
def applied(pipeline: Any, row: Row) -> Iterator[None]:
    """The pipeline with the row's LoRA; afterwards without."""
    if row.lora is None:
        yield
        return
    apply_lora(pipeline, row.lora, row.scale)
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows with different labels: equal ones get the path of their LoRA."""
    labels = [row.label for row in rows]
    return [replace(row, label=f"{row.label}\n{row.lora}") if labels.count(row.label) > 1 else row for row in rows]
