"""The names of what metrics.jsonl logs, each in one place. Image metrics are named by their plug-ins.

A name may have a second part behind it: ``of_metric``, ``of_part``, ``of_time_bin``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

EVAL_LOSS = "eval/loss"
"""The deterministic loss on held-out images."""
EVAL_LOSS_TRAIN = "eval/loss_train"
"""The same on training images, where none could be held out."""
EVAL_LOSSES = (EVAL_LOSS, EVAL_LOSS_TRAIN)
"""A run logs one of them."""
FINAL_LOSS = "eval/final_loss"
"""The loss on the larger set, at both ends of the run."""
GAP = "eval/gap"
"""How far that lies above the loss on training images."""

TRAIN_LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
STEPS_PER_SECOND = "train/steps_per_s"
GRAD_NORM = "train/grad_norm"
SKIPPED = "train/skipped"
"""1 in steps that fp16 skipped, which have no gradient norm."""
OPTIMIZER = "optimizer/"
"""Before the names of what an optimizer counts."""

DW_NORM = "lora/dw_norm"
STABLE_RANK = "lora/stable_rank"
BALANCE = "lora/balance"
UPDATE_RMS = "opt/update_rms"
TOKEN_NORM = "tokens/norm"
TOKEN_CHANGE = "tokens/change"

_IMAGE = "img/"
_JOINT = "_"
"""Between a metric's name and that of a part."""
OTHER_IMAGES = "of other images (other prompts, seeds or settings) or by another encoder"
"""What is said of values of an image metric that must not be compared with its others."""

P_VALUE = "p"
"""The part of a metric's name for the p-value of its test."""
COPIES = "negative"
"""... for its alarm: 1 where the images repeat what they are compared with, else 0."""
RELATIVE = "rel"
"""... for a loss divided, item by item, by the base model's."""

RAW = "raw"
"""... for the loss of the weights without their moving average."""


def of_metric(name: str, part: str) -> str:
    """What a metric says besides its main value ``name``."""
    return f"{name}{_JOINT}{part}"


def relative(name: str) -> str:
    """A loss divided, item by item, by the base model's."""
    return of_metric(name, RELATIVE)


def raw(name: str) -> str:
    """A loss of the weights without their moving average."""
    return of_metric(name, RAW)


def of_part(name: str, part: str) -> str:
    """Of one part of the model, such as "down_blocks"; "" is the whole."""
    return f"{name}/{part}" if part else name


def of_time_bin(name: str, number: int) -> str:
    """Of one part of the schedule; 0 is the least noisy."""
    return f"{name}_t/{number}"


def main_values(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are no part of another of them, in their order."""
    known = dict.fromkeys(names)
    return [name for name in known if not is_part_of_any(name, known)]


def is_part_of_any(name: str, mains: Container[str]) -> bool:
    """Whether it is part of one of ``mains``; they are looked up, since files of others may name any number."""
    return any(name[:at] in mains for at, letter in enumerate(name) if letter == _JOINT)


def is_part(name: str, main: str) -> bool:
    """Whether it is what a metric says besides its main value."""
    return name.startswith(of_metric(main, ""))


def is_image_metric(name: str) -> bool:
    """Whether it was measured of drawn images."""
    return name.startswith(_IMAGE)


def measured_on(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a logged value is of: items, images, encoder. Values of the same may be compared and make one curve."""
    return tuple(row.get(name) for name in ("evalset_id", "images_id", "encoder_id", "n", "n_other"))


def comparable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a metric's rows that may be compared with the last: a resumed run may measure on something else."""
    return [row for row in rows if measured_on(row) == measured_on(rows[-1])]


def short(name: str) -> str:
    """An image metric's name without what all of them begin with."""
    return name.removeprefix(_IMAGE)


def name_of_step_0(init_lora: str | None) -> str:
    """What a run measures and draws before its first step.

    Args:
        init_lora: the option.
    """
    return "start" if init_lora else "base model"
