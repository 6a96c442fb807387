"""What is set for the embedded models unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from dreamlora import tiny
from dreamlora.config import EMBEDDED_MODEL, OWN_IMAGES, RunConfig
from dreamlora.config.measuring import IMAGES_FOR_METRICS
from dreamlora.errors import UserError

_YIELDS = {
    "max_train_steps": ("num_train_epochs",),
    "sample_steps": ("validation_epochs",),
}
"""Entries of the preset that make way when one of these flags is given."""


def brings_images(given: Mapping[str, Any]) -> bool:
    """Whether a person's own images are trained on: nothing of the built-in subject or style is meant then."""
    return any(given.get(flag) for flag in OWN_IMAGES)


def embedded(given: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What is set for an embedded model unless the user says otherwise; nothing for other models.

    Args:
        given: what the user says, by option.
        file: of the program; what the model has otherwise wins over it.

    Raises:
        UserError: there is no such built-in subject or style.
    """
    _check_built_in(given)
    model = given.get("pretrained_model_name_or_path") or EMBEDDED_MODEL
    if model not in tiny.MODELS:
        return {}
    preset = _read(file)
    of_model = _read(tiny.MODELS[model].preset)
    built_in = preset.pop("built_in")
    if not brings_images(given):
        preset |= built_in
        if given.get("subject"):
            preset |= _subject_prompts(given["subject"])
    by_optimizer: dict[str, Any] = {}  # DreamBooth's rates hold wherever a preset names no others
    for rates in (_read(RunConfig.PRESET), preset, of_model):
        for name, own in rates.pop("by_optimizer", {}).items():
            by_optimizer[name] = by_optimizer.get(name, {}) | own
    preset |= of_model
    optimizer = (given.get("optimizer") or "adamw").lower().replace("-", "_")  # a wrong name is found later
    preset |= _in_units(by_optimizer.get(optimizer, {}), given.get("lora_units"))
    if preset.get("sample_prompts"):
        preset["sample_prompts"] = str(tiny.PRESETS / preset["sample_prompts"])
    if given.get("sample_steps") == 0 and all(given.get(flag) is None for flag in IMAGES_FOR_METRICS):
        preset.pop("eval_metrics", None)  # there is nothing to measure
    for entry, flags in _YIELDS.items():
        if any(given.get(flag) is not None for flag in flags):
            preset.pop(entry, None)
    return preset


def _in_units(of_optimizer: dict[str, Any], units: str | None) -> dict[str, Any]:
    """What is set for one optimizer, with the learning rate of the units that were chosen."""
    start_lr = of_optimizer.pop("start_lr", None)
    return {**of_optimizer, "learning_rate": start_lr} if units == "start" and start_lr else of_optimizer


def _read(file: str | None) -> dict[str, Any]:
    entries: dict[str, Any] = yaml.safe_load((tiny.PRESETS / file).read_text(encoding="utf-8")) if file else {}
    return entries


def _check_built_in(given: Mapping[str, Any]) -> None:
    if given.get("subject") is None and given.get("style") is None:
        return
    from dreamlora.tiny import styles, subjects

    for flag, names in (("subject", subjects.SUBJECTS), ("style", styles.STYLES)):
        if given.get(flag) not in (None, *names):
            raise UserError(f"--{flag} takes one of {', '.join(names)} (got {given[flag]!r})")


def _subject_prompts(subject: str) -> dict[str, str]:
    from dreamlora.tiny import subjects

    return {"instance_prompt": subjects.instance_prompt(subject), "class_prompt": subjects.class_prompt(subject)}
