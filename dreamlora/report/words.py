"""Numbers of a run in sentences; the HTML and the Markdown report share them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dreamlora import figures, registry
from dreamlora.config import Optim
from dreamlora.config.rates import in_start_units, told_rate
from dreamlora.eval_loss.items import paired_difference
from dreamlora.eval_loss.selection import difference_text
from dreamlora.figures import loss, score
from dreamlora.metric_names import BALANCE, DW_NORM, FINAL_LOSS, GAP, STABLE_RANK, TOKEN_CHANGE, TOKEN_NORM, short
from dreamlora.report.facts import RunFacts

_SAME_DB, _CLOSE_DB = 40.0, 30.0
"""PSNR of images that differ by rounding, and of images that look alike."""
_SAME_CALL = 0.02
"""Error of one call, beyond rounding, up to which the file does the same; all are shares of what the LoRA does.

Measured by tests/training/test_parity.py in fp32, fp16 and bf16: the error of a good file is below what the check takes
for rounding (on two kinds of processor, 0.76 times that at most); with twice or half the alpha it is above 0.35,
without the text encoder's LoRA above 0.07.
"""
_MOST_ROUNDING = 0.5
"""Where rounding makes half of what the LoRA does, one call cannot tell a good file from a bad one."""
_MEMORY = {
    "allocated": "in tensors on the GPU",
    "reserved": "held of the GPU",
    "resident": "of the process, where more than before",
}
"""Kinds of memory, as headings."""
_COARSE = 1e-4
"""Rounding, as a share of the prediction, from which an image of many steps may differ visibly: not in fp32."""


def headline(facts: RunFacts) -> str:
    """What came out, in one or two sentences."""
    evaluation = facts.evaluation
    if evaluation is None:
        return f"{facts.steps} steps were trained; no evaluation was logged."
    count = len(facts.fall_by_image)
    if not evaluation.held_out:
        where = "the training images"
    else:
        where = f"{count} held-out image{'s' if count != 1 else ''}" if count else "the held-out images"
    if evaluation.base is None or evaluation.final_step == 0:
        return f"The loss on {where} is {loss(evaluation.final)} at step {evaluation.final_step}."
    change = evaluation.change or 0.0
    verb = "fell" if change < -0.005 else "rose" if change > 0.005 else "hardly changed:"
    text = f"The loss on {where} {verb} from {loss(evaluation.base)} ({facts.base}) to {loss(evaluation.final)}"
    text += f" ({figures.change(evaluation.final, evaluation.base)})" if abs(change) > 0.005 else ""
    text += "." if facts.finished else " so far."
    if evaluation.past_best:
        where_best = "before the first step" if evaluation.best_step == 0 else f"at step {evaluation.best_step}"
        return f"{text} It was best {where_best}, with {loss(evaluation.best)}: later steps made it worse."
    return text


def spread(facts: RunFacts) -> str | None:
    """How many of the evaluated images follow the mean."""
    falls = facts.fall_by_image
    if len(falls) < 2 or facts.evaluation is None or facts.evaluation.base is None or facts.evaluation.final_step == 0:
        return None
    better = sum(fall > 0 for fall in falls)
    kind = "held-out" if facts.evaluation.held_out else "training"
    return f"The loss is lower than the {facts.base}'s on {better} of the {len(falls)} {kind} images."


def best(facts: RunFacts) -> str | None:
    """Which checkpoint is the best, and why."""
    selection = facts.selection
    if not selection:
        return None
    text = selection.get("reason", f"Step {selection['step']} was selected.")
    apart = facts.best_against_last
    if apart is None:
        return text
    direction = "below" if apart.mean < 0 else "above"
    return f"{text} On the {apart.n} items of the larger set it is {difference_text(apart)} {direction} the last step."


def average(facts: RunFacts) -> str | None:
    """Whether the moving average is better than the weights that it is of; None if there is no such average."""
    both = facts.average_and_raw
    if both is None:
        return None
    average, raw = both
    step = average.steps[-1]
    apart = paired_difference(raw.rows[step], average.rows[step])
    direction = "higher" if apart.mean > 0 else "lower"
    verdict = "which cannot be told apart" if abs(apart.mean) <= apart.se else f"{difference_text(apart)} {direction}"
    text = f"The moving average has a loss of {loss(average.mean(step))} at step {step}, the weights without it have "
    text += f"{loss(raw.mean(step))}, {verdict}."
    return f"{text} Their LoRA lies in raw/." if facts.folder.raw.exists() else text


def final_table(facts: RunFacts) -> list[tuple[str, str, str, str]]:
    """The larger set in rows: what was measured, its loss, against the base model, and the gap; empty if it was not."""
    curve, gap = facts.curve(FINAL_LOSS), facts.curve(GAP)
    if len(curve.steps) < 2:
        return []
    losses, gaps = (dict(zip(one.steps, one.values, strict=True)) for one in (curve, gap))
    best_step, last = facts.selection.get("step"), max(losses)
    names = {0: "base model", last: f"last step, {last}"}
    if best_step == last:
        names[last] = f"best and last step, {last}"
    elif best_step in losses:
        names[best_step] = f"best step, {best_step}"
    rows = []
    for step in sorted(names.keys() & losses.keys()):
        change = figures.change(losses[step], losses[0]) if step and losses.get(0) else figures.NONE
        rows.append((names[step], loss(losses[step]), change, score(gaps[step]) if step in gaps else figures.NONE))
    return rows


def range_table(facts: RunFacts) -> list[tuple[str, str, str]]:
    """The short runs of the range test in rows: learning rate, loss, against the loss before the first step; empty if
    the rate was given.
    """
    start = facts.range_test.get("start")
    return [
        (
            figures.rate(row["learning_rate"]),
            "diverged" if row["value"] is None else loss(row["value"]),
            figures.change(row["value"], start) if start and row["value"] is not None else figures.NONE,
        )
        for row in facts.range_test.get("tried") or []
    ]


def image_table(facts: RunFacts) -> list[tuple[str, str, str, str, str]]:
    """Image metrics in rows: name, base model, last value, number of images, encoder; empty if there are none."""
    rows = []
    for metric in facts.image_metrics:
        first, last = metric.curve.values[0], metric.curve.values[-1]
        base = score(first) if metric.curve.steps[0] == 0 else figures.NONE
        count = str(metric.n) if metric.n_other is None else f"{metric.n} and {metric.n_other}"
        rows.append((short(metric.name), base, score(last), count, metric.encoder_id))
    return rows


def parity(facts: RunFacts) -> tuple[str, str]:
    """Whether the saved file does what training showed: "good", "fair", "bad" or "unknown", and why."""
    check: dict[str, Any] = facts.summary.get("parity") or {}
    if "psnr_db" not in check:
        reason = check.get("reason") or (
            "it is made at the end of a run" if not facts.finished else "no result was saved"
        )
        return "unknown", f"Not checked: {reason}."
    if check.get("base_changed"):
        return "bad", (
            "The base model's own weights changed while the LoRA trained, so that the LoRA fits no base that others "
            "have: this is a fault of dreamlora's, please report it."
        )
    call: dict[str, float] = check.get("call") or {}
    same = _same_call(call)
    if same is False:
        text = f"The saved LoRA in {_pipeline(check)} does not do what it did in training"
        return "bad", f"{text}: {_call_text(call)}."
    verdict, text = _of_image(check, coarse=_coarse(call))
    if same:
        return verdict, f"{text} One call of the denoiser does the same: {_call_text(call)}."
    return verdict, text


def _same_call(call: dict[str, float]) -> bool | None:
    """Whether one call of the denoiser had the same answer; None if that cannot be told."""
    if call.get("rounding", 1.0) > _MOST_ROUNDING:
        return None
    return call["error"] <= _SAME_CALL + call["rounding"]


def _coarse(call: dict[str, float]) -> bool:
    return call.get("rounding", 0.0) * call.get("effect", 0.0) > _COARSE


def _call_text(call: dict[str, float]) -> str:
    error, rounding = (f"{call[name]:.2g}" for name in ("error", "rounding"))
    return (
        f"it has {call['scale']:.2f} times the effect, and differs by {error} of the effect (rounding makes {rounding})"
    )


def _of_image(check: dict[str, Any], *, coarse: bool) -> tuple[str, str]:
    """Verdict and sentence of the image alone; ``coarse``: rounding adds up over the steps until it can be seen."""
    decibels, largest, mean = (float(check.get(key) or 0) for key in ("psnr_db", "max_abs", "mean_abs"))
    apart = f"largest difference {largest:g} of 255, mean {mean:.3g}, PSNR {decibels:.0f} dB"
    lora = f"The saved LoRA, loaded into {_pipeline(check)}, draws"
    if largest == 0:
        return "good", f"{lora} exactly the image seen in training."
    if decibels >= _SAME_DB:
        return "good", f"{lora} the image seen in training but for rounding ({apart})."
    if decibels >= _CLOSE_DB:
        return "good" if coarse else "fair", f"{lora} nearly the image seen in training ({apart})."
    if coarse:
        return "fair", f"{lora} an image like that seen in training ({apart}): rounding adds up over the steps."
    return "bad", f"The saved LoRA in {_pipeline(check)} does not draw the image seen in training ({apart})."


def _pipeline(check: dict[str, Any]) -> str:
    """What the file was loaded into, and by whom."""
    by_us = " by dreamlora itself, as diffusers' loader knows no adapters of this kind"
    pipelines = {
        "full": "a freshly loaded stock diffusers pipeline",
        "lean": "a stock diffusers pipeline around the base model of the training",
    }
    pipeline = pipelines.get(check.get("kind", ""), "a stock diffusers pipeline")
    return pipeline + (by_us if check.get("loader") == "dreamlora" else "")


def evaluation_price(facts: RunFacts) -> str | None:
    """What the evaluation loss cost; None if it was not measured, or the run has not ended."""
    price, training = facts.summary.get("eval_price") or {}, dict(seconds_of(facts)).get("training")
    if not price:
        return None
    took = f" They took {duration(price['seconds'])} of the {duration(training)} of training." if training else ""
    return f"{price['sentence']}{took}"


def health(facts: RunFacts) -> str | None:
    """What became of the LoRA's factors, in two or three sentences; None if it was not logged."""
    change, rank, balance = (facts.curve(name) for name in (DW_NORM, STABLE_RANK, BALANCE))
    if not change:
        return None
    text = f"The LoRA has moved the weights by ‖ΔW‖ = {change.values[-1]:.3g}"
    shares = {name: curve.values[-1] ** 2 for name, curve in facts.groups(DW_NORM).items() if name}
    whole = sum(shares.values())
    if whole > 0:
        most = max(shares, key=lambda name: shares[name])
        text += f", {shares[most] / whole:.0%} of it (of the square) in {most}"
    text += "."
    if rank:
        text += f" Stable rank per layer: {rank.values[-1]:.2g} (near 1: one direction does nearly everything)."
    if balance:
        text += f" Balance of A and B: {balance.values[-1]:.2f} (1: equal Gram matrices, 0: one factor is zero)."
    length, moved = (facts.curve(name) for name in (TOKEN_NORM, TOKEN_CHANGE))
    if length and moved:
        text += (
            f" The embeddings of new tokens are {length.values[-1]:.2g} times as long as the model's own, and have "
            f"moved by {moved.values[-1]:.2g} of that length."
        )
    return text


def setup(facts: RunFacts) -> str:
    """What was trained, in one line."""
    config = facts.config
    adapter = config.get("adapter")
    kind = registry.load("adapters", adapter).NAME if adapter in registry.names("adapters") else "LoRA"
    parts = [f"{kind} of rank {config.get('rank', '?')} on {facts.model}", str(config.get("optimizer", "?"))]
    if config.get("learning_rate") is not None:
        rate = told_rate(str(config.get("optimizer")), f"{config['learning_rate']:g}")
        found = " (found by a range test)" if facts.range_test else ""
        parts.append(f"learning rate {rate}{_units(config)}{found}")
    of = "" if facts.total_steps in (None, facts.steps) else f" of {facts.total_steps}"
    parts.append(f"{facts.steps}{of} steps")
    if facts.summary.get("device"):
        parts.append(str(facts.summary["device"]))
    return " · ".join(parts)


def _units(config: Mapping[str, Any]) -> str:
    optimizer, start = config.get("optimizer"), config.get("lora_units") == "start"
    if start and optimizer in registry.names("optimizers"):
        start = in_start_units(Optim(optimizer=optimizer, lora_units="start"))
    return " in units of the start" if start else ""


def numbers(facts: RunFacts) -> list[tuple[str, str]]:
    """The few figures at the top: label and value."""
    data, lora = facts.summary.get("data") or {}, facts.summary.get("lora") or {}
    timings = seconds_of(facts)
    figures: list[tuple[str, str]] = []
    if data.get("instance"):
        held_out = len(facts.fall_by_image) if facts.evaluation and facts.evaluation.held_out else 0
        kinds = ((held_out, "held out"), (data.get("class"), "class"))
        figures.append(
            ("images", str(data["instance"]) + "".join(f" + {count} {kind}" for count, kind in kinds if count))
        )
    if lora.get("parameters"):
        figures.append(("LoRA parameters", f"{lora['parameters']:,}".replace(",", "\u202f")))
    if facts.evaluation:
        figures.append(("best step", str(facts.selection.get("step", facts.evaluation.best_step))))
    if facts.speed:
        figures.append(("steps per second", f"{facts.speed:.3g}"))
    if timings:
        figures.append(("total time", duration(sum(value for _, value in timings))))
    return figures


def seconds_of(facts: RunFacts) -> list[tuple[str, float]]:
    """Stages and their seconds, in the order they ran."""
    return [(str(stage), float(value)) for stage, value in (facts.summary.get("timings") or {}).items()]


def peaks_of(facts: RunFacts) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What of memory was counted, as headings, and every stage's peaks of it in GiB; both empty if nothing was."""
    peaks = facts.summary.get("peak_memory") or {}
    kinds = [kind for kind in _MEMORY if any(kind in found for found in peaks.values())]
    rows = [
        (stage, [f"{found[kind]:.2f}" if kind in found else "" for kind in kinds]) for stage, found in peaks.items()
    ]
    return [_MEMORY[kind] for kind in kinds], rows if kinds else []


def duration(seconds: float) -> str:
    """``75`` as "1 min 15 s"."""
    if math.isinf(seconds):
        return "∞"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
