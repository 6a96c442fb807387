"""Run folders become compare.json."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dreamlora import metrics
from dreamlora.compare import numbers, verdict
from dreamlora.compare.endings import Judge, judge_of
from dreamlora.compare.methods import Group, differing_options, group, labelled, shared_options
from dreamlora.compare.pictures import with_own_pictures
from dreamlora.compare.records import Record, data_name, model_name, read_record
from dreamlora.compare.schema import COMPARE_FILE, COMPARISON, SCHEMA_VERSION, Comparison, Dropped, Task
from dreamlora.compare.stats import MIN_SEEDS
from dreamlora.config import instance_prompt_of
from dreamlora.errors import UserError
from dreamlora.files import write_atomically
from dreamlora.metric_names import EVAL_LOSS, is_part_of_any, main_values, short

BASELINE = "adamw"


@dataclass(frozen=True)
class ComparisonPlan:
    """What the program that makes the runs knows, and run folders alone do not tell.

    Attributes:
        baseline: label of the method that the others are compared with; None: AdamW if it is there, else the first.
        headline_seeds: seeds kept for the headline; None: those that occur at one learning rate alone.
        added: (label, learning rate) of rates that were added because the best lay at an edge.
        missing: runs that are still to come.
        command: that makes the comparison.
    """

    baseline: str | None = None
    headline_seeds: Collection[int] | None = None
    added: Collection[tuple[str, float]] = field(default_factory=tuple)
    missing: int = 0
    command: str | None = None


def compare_runs(folders: Sequence[Path], root: Path, plan: ComparisonPlan = ComparisonPlan()) -> Comparison:
    """Compare runs.

    Args:
        folders: of the runs.
        root: folder that compare.json will lie in; files are named relative to it.
        plan: what is known besides.

    Raises:
        UserError: a folder holds no run, or the runs cannot be compared: other evaluation sets, other losses, no
            evaluation of the base model, no seed in common, nothing that has ended.
    """
    records, dropped = _ended([read_record(folder, numbers.relative(folder, root)) for folder in folders])
    _check_pairable(records)
    records, of_images = _with_shared_images(records)
    methods = labelled(records)
    baseline_label = _baseline(plan.baseline, list(methods))
    options = differing_options(methods)
    groups = _grouped(methods, plan.headline_seeds)
    groups = [replace(one, options=options[one.label]) for one in groups]
    groups.sort(key=lambda one: one.label != baseline_label)  # stable: the baseline first, then as given
    baseline = groups[0]
    _check_common_seeds(groups, plan)
    against = numbers.Against(
        baseline=baseline,
        judge=judge_of(record for one in groups for record in one.sound.values()),
        target=numbers.target_of(baseline),
        best=min((one.best.score for one in groups if one.best), default=math.nan),
        base=float(np.median([record.base for record in records if math.isfinite(record.base)] or [math.nan])),
        root=root,
        added=plan.added,
    )
    found = _comparison(groups, against, plan, dropped)
    found["warnings"] += of_images
    return found


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write compare.json: strict JSON, the same bytes for the same runs; and copies of pictures from elsewhere.

    Raises:
        UserError: the runs hold more than compare.json can; nothing was written.
        WriteError: the system refused.
    """
    file = folder / COMPARE_FILE
    try:
        COMPARISON.check(comparison)
    except ValueError as error:
        raise UserError(f"cannot compare these runs: it does not fit into {COMPARE_FILE}: {error}") from None
    comparison = with_own_pictures(comparison, folder)
    write_atomically(file, json.dumps(comparison, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return file


def _comparison(
    groups: Sequence[Group], against: numbers.Against, plan: ComparisonPlan, dropped: Sequence[Dropped]
) -> Comparison:
    baseline = groups[0]
    records = [record for one in groups for record in one.records]
    one = next(record for record in records if record.losses)
    methods = [numbers.method(one, against) for one in groups]
    findings = [(method["delta"]["sentence"], method["delta"]["word"]) for method in methods if method["delta"]]
    held_out = one.metric == EVAL_LOSS
    task = _task(records, against.judge)
    headline = {record.id for one in groups for record in one.headline.values()}
    return Comparison(
        schema_version=SCHEMA_VERSION,
        name=against.root.resolve().name,
        complete=plan.missing == 0,
        metric=one.metric,
        held_out=held_out,
        sentence=verdict.headline_sentence(findings, baseline.label, plan.missing == 0),
        task=task,
        baseline=baseline.label,
        base_loss=numbers.number(against.base),
        target=numbers.number(against.target),
        fresh_seeds=all(one.fresh for one in groups),
        budget=verdict.budget(groups, baseline, one.metric, task),
        warnings=verdict.warnings(groups, held_out, {one.label: dict(one.options) for one in groups}),
        methods=methods,
        same_lr=numbers.same_rates(groups, baseline),
        runs=[
            numbers.run_row(record, one.label, record.id in headline, against)
            for one in groups
            for record in one.records
        ],
        dropped=[*dropped, *(row for one in groups for row in one.dropped)],
        command=plan.command,
    )


def _grouped(methods: Mapping[str, Sequence[Record]], headline_seeds: Collection[int] | None) -> list[Group]:
    """The runs of every method, with the seeds that speak for it.

    Where nobody says which seeds are fresh, those that a method has at one rate alone may be, or be what is left of one
    that failed at the other rates. They are taken for fresh if enough of them are common to all methods.
    """
    groups = [group(label, runs, headline_seeds) for label, runs in methods.items()]
    if headline_seeds is None:
        seeds = [set(one.headline) for one in groups if one.headline]
        if any(one.fresh for one in groups) and len(set.intersection(*seeds)) < MIN_SEEDS:
            groups = [group(label, runs, ()) for label, runs in methods.items()]
    return groups


def _ended(records: Sequence[Record]) -> tuple[list[Record], list[Dropped]]:
    """Runs that finished, diverged or failed; why the others are left out."""
    kept, dropped = [], []
    for record in records:
        if record.ended in ("diverged", "failed") or (record.ended == "finished" and record.losses):
            kept.append(record)
        else:
            dropped.append(Dropped(run=record.id, reason="it has not ended"))
    if not any(record.losses for record in kept):
        reasons = [(record.id, f"it {record.ended}: {record.message}") for record in kept]
        reasons += [(one["run"], one["reason"]) for one in dropped]
        first = f" ({reasons[0][0]}: {reasons[0][1]})" if reasons else ""
        raise UserError(f"there is no run to compare that has ended{first}: finish the runs first")
    return kept, dropped


def _check_pairable(records: Sequence[Record]) -> None:
    measured = [record for record in records if record.losses]
    first = measured[0]
    for record in measured:
        if record.metric != first.metric:
            raise UserError(
                f"cannot compare {record.metric} (run {record.id}) with {first.metric} (run {first.id}): one run held "
                "images out, the other did not; give both the same images and the same --holdout"
            )
        if record.evalset_id != first.evalset_id:
            raise UserError(
                f"cannot pair runs: evalset {first.evalset_id} (run {first.id}) != {record.evalset_id} (run "
                f"{record.id}): other images, captions, base model or --eval_seed. Train one of them again with those "
                "of the other"
            )
    _check_image_metrics(records)


def _check_image_metrics(records: Sequence[Record]) -> None:
    """Image metrics of different encoders, and those of sets, or unknown here, of different numbers of images."""
    plugins = metrics.by_value()
    seen: dict[str, tuple[str, str]] = {}
    for record in records:
        for name in main_values(record.images):
            of_sets = name not in plugins or plugins[name].COMPARES_SETS
            for value in record.images[name]:
                others = "" if value.images_other is None else f" against {value.images_other}"
                about = f"encoder {value.encoder_id}" + (f" and n={value.images}{others}" if of_sets else "")
                known, run = seen.setdefault(name, (about, record.id))
                if known != about:
                    raise UserError(
                        f"cannot compare {name}: run {run} has {known}, run {record.id} has {about}; "
                        "evaluate both with the same encoder and number of images"
                    )


def _with_shared_images(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The records without image metrics that not all runs have of the same images, and what is to be said of that."""
    ids: dict[str, dict[str | None, str]] = {}
    for record in records:
        for name in main_values(record.images):
            for value in record.images[name]:
                ids.setdefault(name, {}).setdefault(value.images_id, record.id)
    apart = {name: list(runs.values()) for name, runs in ids.items() if len(runs) > 1}
    if not apart:
        return list(records), []
    one, other = next(iter(apart.values()))[:2]
    text = (
        f"{', '.join(map(short, apart))} cannot be compared: the images of run {other} have other prompts, seeds or "
        f"settings than those of run {one}."
    )
    kept = [
        replace(
            record,
            images={
                name: values
                for name, values in record.images.items()
                if name not in apart and not is_part_of_any(name, apart)
            },
        )
        for record in records
    ]
    return kept, [text]


def _check_common_seeds(groups: Sequence[Group], plan: ComparisonPlan) -> None:
    baseline, others = groups[0], groups[1:]
    if plan.missing or not others or not baseline.headline:
        return
    compared = [one for one in others if one.headline]
    if compared and not any(one.headline.keys() & baseline.headline.keys() for one in compared):
        theirs = ", ".join(map(str, sorted(baseline.headline)))
        ours = ", ".join(map(str, sorted(compared[0].headline)))
        raise UserError(
            f"cannot pair runs: {baseline.label} has seeds {theirs}, {compared[0].label} has {ours}. Train both with "
            "the same seeds"
        )


def _baseline(asked: str | None, labels: Sequence[str]) -> str:
    if asked is None:
        return BASELINE if BASELINE in labels else labels[0]
    if asked not in labels:
        raise UserError(f"--baseline {asked}: no such method among the runs; there are {', '.join(labels)}")
    return asked


def _task(records: Sequence[Record], judge: Judge) -> Task:
    one = next((record for record in records if record.summary), records[0])
    config: Mapping[str, Any] = one.config
    return Task(
        model=model_name(config),
        data=data_name(config),
        instance_prompt=instance_prompt_of(config),
        steps=config.get("max_train_steps"),
        evalset_id=next(record.evalset_id for record in records if record.losses),
        eval_items=judge.items,
        eval_images=judge.images,
        final_evalset_id=judge.evalset_id,
        options=shared_options(records),
        device=one.summary.get("device"),
        git_commit=one.summary.get("git_commit"),
        versions=dict(one.summary.get("versions") or {}),
    )
