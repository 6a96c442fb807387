"""What is set for the embedded model unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from dreamlora import tiny
from dreamlora.config import EMBEDDED_MODEL, RunConfig
from dreamlora.config.measuring import IMAGES_FOR_METRICS
from dreamlora.errors import UserError

Given = list[str] | bool | None
"""What is given for one flag, see ``parse.Values``."""

_YIELDS = {
    "subject": ("instance_data_dir", "dataset_name"),
    "style": ("train_data_dir", "dataset_name"),
    "max_train_steps": ("num_train_epochs",),
    "sample_steps": ("validation_epochs",),
}
"""Entries of the preset that make way when one of these flags is given."""


def embedded(given: Mapping[str, Given], file: str) -> dict[str, Any]:
    """What ``file`` sets for the embedded model unless the user says otherwise; nothing for other models.

    Raises:
        UserError: there is no such built-in subject.
    """
    if _last(given, "pretrained_model_name_or_path", EMBEDDED_MODEL) != EMBEDDED_MODEL:
        return {}
    preset: dict[str, Any] = yaml.safe_load((tiny.PRESETS / file).read_text())
    by_optimizer = _rates(RunConfig.PRESET) | preset.pop("by_optimizer", {})
    optimizer = _last(given, "optimizer", "adamw").lower().replace("-", "_")  # a wrong name is found later
    preset |= by_optimizer.get(optimizer, {})
    if given.get("subject"):
        preset |= _subject_prompts(_last(given, "subject", ""))
    if preset.get("sample_prompts"):
        preset["sample_prompts"] = str(tiny.PRESETS / preset["sample_prompts"])
    if _last(given, "sample_steps", "") == "0" and not any(given.get(flag) for flag in IMAGES_FOR_METRICS):
        preset.pop("eval_metrics", None)  # there is nothing to measure
    for entry, flags in _YIELDS.items():
        if any(given.get(flag) is not None for flag in flags):
            preset.pop(entry, None)
    return preset


def _rates(file: str) -> dict[str, Any]:
    """What a preset sets for single optimizers; those of DreamBooth hold wherever a preset names no others."""
    rates: dict[str, Any] = yaml.safe_load((tiny.PRESETS / file).read_text())["by_optimizer"]
    return rates


def _subject_prompts(subject: str) -> dict[str, str]:
    from dreamlora.tiny import subjects

    if subject not in subjects.SUBJECTS:
        raise UserError(f"--subject takes one of {', '.join(subjects.SUBJECTS)} (got {subject!r})")
    return {"instance_prompt": subjects.instance_prompt(subject), "class_prompt": subjects.class_prompt(subject)}


def _last(given: Mapping[str, Given], name: str, default: str) -> str:
    values = given.get(name)
    return values[-1] if isinstance(values, list) and values else default
