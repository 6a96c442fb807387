"""What a comparison says in words: findings, the budget, what to be careful about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dreamlora import figures
from dreamlora.compare.methods import Group
from dreamlora.compare.schema import Comparison, Edge, Task, Word
from dreamlora.compare.stats import EQUIVALENT_PCT, MIN_SEEDS, PairedDelta, TInterval
from dreamlora.config.rates import told_rate
from dreamlora.escapes import one_line

EDGES: Mapping[Edge, str] = {"low": "lowest", "high": "highest"}
ABOVE_BASE_TEXT = "ended above the base model's loss"


def table(comparison: Comparison) -> str:
    """The main numbers for a terminal, a line per method."""
    rows = [("method", "learning rate", f"final {comparison['metric']}", "to baseline", "steps to target", "verdict")]
    for method in comparison["methods"]:
        delta = method["delta"]
        rows.append(
            (
                one_line(method["label"]),
                rate_text(method),
                figures.spread(method["final"]),
                "baseline" if delta is None else figures.interval(delta["pct"]),
                figures.spread(method["steps_to_target"]["spread"], figures.amount),
                "" if delta is None else delta["verdict"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def rate_text(method: Mapping[str, Any]) -> str:
    """The learning rate that a method's numbers are of: the best that was tried, or what its runs found."""
    found = method.get("found_lrs")
    return found_text(found) if found else told_rate(method["optimizer"], figures.rate(method["best_lr"]))


def found_text(rates: Sequence[float]) -> str:
    """``found by each run, 0.0016 to 0.0024``."""
    ends = dict.fromkeys(map(figures.rate, (min(rates), max(rates))))
    return f"found by each run, {' to '.join(ends)}"


def delta_sentence(label: str, baseline: str, delta: PairedDelta, broke: int, word: Word) -> str:
    """One finding: "scaled_adamw: loss −2.1 % [−3.0, −1.2] against adamw, lower in 5 of 5 seeds: better".

    Seeds in which one of the two has no loss come first: without them the difference would flatter who failed.

    Args:
        label, baseline: the two methods.
        delta: their seeds.
        broke: seeds that ended above the base model's loss, unlike the baseline's.
        word: the verdict.
    """
    n, ended = delta.pct.n, delta.ended
    if not n and word == "worse":
        return f"{label}: diverged or failed at every learning rate, unlike {baseline}: worse"
    if not n:
        return f"{label}: no pair of finished runs with {baseline}"
    parts = [f"diverged or failed in {delta.lost} of {n} seeds, unlike {baseline}"] if delta.lost else []
    parts += [f"{baseline} diverged or failed in {delta.gained} of {n} seeds, unlike {label}"] if delta.gained else []
    if ended.n:
        parts.append(_difference(baseline, ended) + (f" in the other {ended.n}" if ended.n < n else ""))
    parts.append(f"lower in {delta.wins} of {n} seeds")
    parts += [f"{broke} of {n} seeds {ABOVE_BASE_TEXT}"] if broke else []
    return f"{label}: {', '.join(parts)}: {word}"


def _difference(baseline: str, pct: TInterval) -> str:
    return f"loss {figures.interval(asdict(pct))} against {baseline}"


def headline_sentence(sentences: Sequence[tuple[str, Word]], baseline: str, complete: bool) -> str:
    """The verdict for the top of the page."""
    lead = "" if complete else "Not complete yet. "
    if not sentences:
        return f"{lead}There is nothing to compare {baseline} with."
    return lead + ". ".join(sentence for sentence, _ in sentences) + "."


def budget(groups: Sequence[Group], baseline: Group, metric: str, task: Task) -> list[str]:
    """The fixed text of every report: the tuning budget, what was selected on what, what this cannot show."""
    lines = []
    for group in groups:
        if group.tests:
            lines.append(
                f"{group.label}: {len(group.records)} runs, each at the rate that its own range test found "
                f"({group.found[0]:g} to {group.found[-1]:g}), {len(group.headline)} of them headline runs."
            )
            continue
        rates = ", ".join(f"{rate.lr:g}" for rate in group.rates)
        seeds = len(group.rates[0].records) if group.rates else 0
        lines.append(
            f"{group.label}: {len(group.records)} runs; {len(group.rates)} learning rates ({rates}) "
            f"× {seeds} tuning seed{'s' if seeds != 1 else ''}, {len(group.headline)} headline runs at "
            + (f"{group.best.lr:g}." if group.best else "none (runs diverged or failed at every rate).")
        )
    fresh = all(group.fresh for group in groups)
    lines += [
        f"Each method's learning rate was selected by the lowest median of its final {metric}; "
        + (
            "the numbers compared come from runs with other seeds."
            if fresh
            else "the numbers compared come from the same runs, which flatters the method with more learning rates."
        ),
        f"Verdicts compare final {metric} with {baseline.label}, paired by seed (same LoRA start, images, noise and "
        f"times), with a 95 % Student-t interval over seeds: better or worse if it excludes 0, equivalent if it lies "
        f"within ±{EQUIVALENT_PCT:g} %, else inconclusive; below {MIN_SEEDS} seeds there is no verdict.",
        f"A run that diverged or failed counts as worse than any other. A method that has one, or one that "
        f"{ABOVE_BASE_TEXT}, in a seed where {baseline.label} has none, is called neither better nor equivalent.",
        f"The loss at the end is measured on {task['eval_items']} items of {task['eval_images']} images, the same for "
        "all seeds: the intervals do not contain what other images would change.",
        f"One subject ({task['data']}), one base model ({task['model']}): other subjects and models can give other "
        "answers.",
    ]
    if len(groups) > 3:
        lines.append(
            f"{len(groups) - 1} methods are compared with {baseline.label}, each at 95 %: the more there are, the "
            "likelier it is that one is called better or worse by chance."
        )
    return lines


def warnings(groups: Sequence[Group], held_out: bool, options: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What a reader must know before believing the numbers."""
    texts = []
    if not held_out:
        texts.append("No held-out images: the loss is that of training images, and overfitting cannot be seen.")
    counts = {len(group.rates) for group in groups}
    if len(counts) > 1 and not all(group.fresh for group in groups):
        texts.append(
            "The methods had different numbers of learning rates, and no fresh seeds: the one with more is favoured."
        )
    for group in groups:
        if not group.tuned:
            texts.append(
                f"{group.label} was run at one learning rate: the effects of rate and method cannot be told apart."
            )
        if group.edge:
            tries = " ".join(f"{lr:g}" for lr in group.suggested)
            texts.append(
                f"{group.label}: the best learning rate is the {EDGES[group.edge]} tried; "
                f"a better one may lie beyond. Try --learning_rates {tries} as well."
            )
        texts += _about_endings(group)
    for name in next(iter(options.values()), {}):
        values = ", ".join(f"{label}: {own[name]}" for label, own in options.items())
        texts.append(f"Besides the optimizer and its learning rate, the methods differ in {name} ({values}).")
    return texts


def _about_endings(group: Group) -> list[str]:
    """Runs that ended badly, and unreadable lines."""
    texts, count = [], len(group.records)
    lost = [record for record in group.records if not record.sound]
    if lost:
        texts.append(f"{group.label}: {len(lost)} of {count} runs diverged or failed; they count as the worst.")
    failed = [record for record in lost if record.status == "failed"]
    if failed:
        texts.append(
            f"{group.label}: {len(failed)} of {count} runs failed, which may not be the method's fault; the next call "
            f"tries again. The first, {failed[0].id}: {failed[0].message}"
        )
    above = sum(record.above_base for record in group.records)
    if above:
        texts.append(f"{group.label}: {above} of {count} runs {ABOVE_BASE_TEXT}.")
    return texts + [f"{text}." for record in group.records for text in record.damage]
