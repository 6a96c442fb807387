"""Which checkpoint is best, and when more training is in vain: pure functions of the item losses. Needs no torch.

The rule for the best: the earliest step whose loss lies within one paired standard error of the lowest. It is applied
as measurements come in, so that the weights of few steps have to be kept: a step is a candidate while it has the lowest
loss so far, stays one while it is within one standard error of every new lowest, and is out for good otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamlora.eval_loss.items import Difference, ItemLosses
from dreamlora.figures import loss, size_in_percent

SCHEMA_VERSION = 1
RULE = (
    "the earliest step whose loss lies within one paired standard error of the lowest, and of every one that was the "
    "lowest since"
)


def candidates(
    losses: ItemLosses, vetoes: Collection[int] = (), lost: Collection[int] = (), until: int | None = None
) -> list[int]:
    """Steps that are or may become the best, ascending, with descending losses; the first is the best so far.

    The base model (step 0) is none: a LoRA that does nothing is no checkpoint.

    Args:
        losses: all measurements.
        vetoes: steps that must not be taken as long as there are others.
        lost: steps whose weights are not at hand.
        until: what was known at this step; None: now.
    """
    steps = [step for step in losses.steps if step and step not in lost and (until is None or step <= until)]
    return _staircase(losses, [step for step in steps if step not in vetoes]) or _staircase(losses, steps)


def _staircase(losses: ItemLosses, steps: Sequence[int]) -> list[int]:
    kept: list[int] = []
    for step in steps:
        lowest = losses.mean(kept[-1]) if kept else math.inf
        if losses.mean(step) < lowest:  # False for NaN
            kept = [earlier for earlier in kept if _within_noise(losses.difference(earlier, step))] + [step]
    return kept


def _within_noise(apart: Difference) -> bool:
    return apart.mean <= apart.se


@dataclass(frozen=True)
class Selection:
    """The best checkpoint and why it is.

    Attributes:
        step: of the checkpoint.
        metric: that was compared: "eval/loss" or "eval/loss_train".
        facts: what selection.json holds: ``reason`` in words, and the numbers that it tells.
    """

    step: int
    metric: str
    facts: dict[str, Any]

    @property
    def reason(self) -> str:
        """One or a few sentences."""
        return str(self.facts["reason"])


def select(
    losses: ItemLosses,
    metric: str,
    vetoes: Mapping[int, str] | None = None,
    lost: Collection[int] = (),
    base: str = "base model",
) -> Selection | None:
    """The best of all measured steps; None if there is none yet.

    If every step is vetoed, the vetoes are passed over, and the reason says so.

    Args:
        losses: all measurements.
        metric: their name; one that ends in "_train" was measured on training images.
        vetoes: steps that must not be taken, each with the reason.
        lost: steps whose weights are not at hand.
        base: what was measured at step 0.
    """
    vetoes = vetoes or {}
    kept = candidates(losses, vetoes, lost)
    if not kept:
        return None
    passed_over = kept[0] in vetoes
    step, lowest = kept[0], kept[-1]
    refused = {} if passed_over else vetoes
    others = [other for other in losses.steps if other not in (0, step, *refused) and math.isfinite(losses.mean(other))]
    runner_up = min(others, key=losses.mean, default=None)
    reason = [
        _main_reason(losses, metric, step, lowest, refused),
        _against_runner_up(losses, step, lowest, runner_up, refused),
    ]
    reason += [_against_base(losses, step, base), _about_vetoes(vetoes, passed_over), _about_images(metric)]
    facts = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "reason": " ".join(filter(None, reason)),
        "rule": RULE,
        "metric": metric,
        "value": losses.mean(step),
        "n": losses.image.size,
        "evalset_id": losses.evalset_id,
        "lowest": _compared(losses, lowest, step),
        "runner_up": None if runner_up is None else _compared(losses, runner_up, step),
        "base": _compared(losses, 0, step) if 0 in losses else None,
        "last": _compared(losses, losses.steps[-1], step),
        "vetoed": {str(vetoed): text for vetoed, text in sorted(vetoes.items())},
        "vetoes_passed_over": passed_over,
    }
    return Selection(step, metric, facts)


def _compared(losses: ItemLosses, step: int, best: int) -> dict[str, Any]:
    """A step's loss, and how far it lies above the best step's."""
    apart = losses.difference(step, best)
    numbers = {
        "value": losses.mean(step),
        "difference": apart.mean,
        "standard_error": apart.se,
        "standard_errors": apart.standard_errors,
    }
    return {"step": step, **{name: value if math.isfinite(value) else None for name, value in numbers.items()}}


def _main_reason(losses: ItemLosses, metric: str, step: int, lowest: int, refused: Collection[int]) -> str:
    lower = any(losses.mean(other) < losses.mean(lowest) for other in refused if other in losses)
    of_which = " of those that are not refused" if lower else ""
    value = f"{metric} {loss(losses.mean(step))} on {losses.image.size} items"
    if step == lowest:
        return f"Best: step {step}, because it has the lowest loss{of_which} ({value})."
    apart = losses.difference(step, lowest)
    return (
        f"Best: step {step}, because it is the earliest whose loss ({value}) cannot be told from the lowest{of_which}: "
        f"step {lowest} has {loss(losses.mean(lowest))}, which is {difference_text(apart)} lower."
    )


def _against_runner_up(
    losses: ItemLosses, step: int, lowest: int, runner_up: int | None, refused: Collection[int]
) -> str:
    if runner_up is None:
        return "No other step was measured." if not refused else "No other step could be taken."
    if step != lowest:  # the sentence before was about it
        return ""
    apart = losses.difference(runner_up, step)
    return f"The runner-up, step {runner_up} with {loss(losses.mean(runner_up))}, is {difference_text(apart)} higher."


def _against_base(losses: ItemLosses, step: int, name: str) -> str:
    if 0 not in losses:
        return ""
    apart = losses.difference(step, 0)
    base = losses.mean(0)
    if apart.mean < -2 * apart.se:
        return f"The {name} has {loss(base)}: the loss fell by {size_in_percent(-100 * apart.mean / base)}."
    how = "lower" if apart.mean > 0 else "no higher than noise explains"
    return f"The {name} has {loss(base)}, which is {how}: by this measure the training did not help."


def _about_vetoes(vetoes: Mapping[int, str], passed_over: bool) -> str:
    if not vetoes:
        return ""
    if passed_over:
        return f"Every step was refused ({next(iter(vetoes.values()))}), so the loss alone decided."
    steps = ", ".join(map(str, sorted(vetoes)))
    return f"Refused: step{'s' if len(vetoes) > 1 else ''} {steps} ({vetoes[min(vetoes)]})."


def _about_images(metric: str) -> str:
    return "No images were held out: the loss of training images cannot see overfitting." if "_train" in metric else ""


def difference_text(apart: Difference) -> str:
    """A paired difference in words: size and standard errors."""
    errors = abs(apart.standard_errors)
    size = f"{abs(apart.mean):.2g}"
    return f"{size} ({errors:.1f} paired standard errors)" if math.isfinite(errors) else size


@dataclass(frozen=True)
class Stall:
    """The run has stopped getting better.

    Attributes:
        step: of the last measurement that was a clear improvement.
        waited: measurements since then.
        apart: the last measurement against that step.
    """

    step: int
    waited: int
    apart: Difference


def stalled(losses: ItemLosses, patience: int) -> Stall | None:
    """Whether the last ``patience`` measurements brought no clear improvement; None if one did.

    An improvement is clear if the paired differences to the last clear improvement are below zero by more than their
    standard error. That reference stays where it is in between, so slow progress adds up and is seen; and the items
    are the same, so the noise of their times and images, many times larger than progress, does not enter.
    """
    if not losses.rows:
        return None
    reference, *later = losses.steps
    waited = 0
    for step in later:
        apart = losses.difference(step, reference)
        if apart.mean < -apart.se:
            reference, waited = step, 0
        else:
            waited += 1
    if waited < patience:
        return None
    return Stall(reference, waited, losses.difference(losses.steps[-1], reference))
