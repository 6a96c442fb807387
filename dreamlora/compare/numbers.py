"""From a group of runs to the numbers of compare.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamlora.compare import stats
from dreamlora.compare.endings import Judge
from dreamlora.compare.methods import Group, Rates
from dreamlora.compare.records import OCTILES, ImageValue, Record
from dreamlora.compare.schema import (
    Band,
    Basin,
    Cell,
    ComparedImageMetric,
    Delta,
    Interval,
    Method,
    Number,
    Octile,
    Pair,
    RatePoint,
    RunRow,
    SameRate,
    Samples,
    Spread,
    ToTarget,
)
from dreamlora.compare.verdict import ABOVE_BASE_TEXT, delta_sentence
from dreamlora.figures import MOST
from dreamlora.metric_names import UPDATE_RMS, main_values
from dreamlora.reading import is_regular
from dreamlora.sampling.recorded import motif_of
from dreamlora.schemas import lies_below

TOLERANCES = (0.02, 0.05, 0.10, 0.25)
EDGE_TEXT = "LR grid edge"
MOST_SAMPLES = 10**4
"""Rows of a run's samples that are taken, of which a page shows a few dozen."""
NOT_TUNED_TEXT = "not tuned: LR effect and optimizer effect cannot be separated"


@dataclass(frozen=True)
class Against:
    """What the numbers of a method refer to.

    Attributes:
        baseline: the baseline's runs.
        target: loss to reach.
        judge: what the end of the headline runs is measured on.
        best: the lowest median loss of any method at any rate.
        base: loss of the base model.
        root: folder that files are named relative to.
        added: (label, rate) of the rates that were added to the grid.
    """

    baseline: Group
    judge: Judge
    target: float
    best: float
    base: float
    root: Path
    added: Collection[tuple[str, float]] = ()


def number(value: float) -> Number:
    """A number as compare.json has it."""
    value = float(value)
    if math.isnan(value):
        return None
    return value if abs(value) <= MOST else "inf" if value > 0 else "-inf"


def spread(values: Iterable[float]) -> Spread:
    """Median and range of the values that are not NaN; inf counts."""
    known = [float(value) for value in values if not math.isnan(value)]
    if not known:
        return Spread(median=None, min=None, max=None, n=0)
    middle = np.sort(known)[(len(known) - 1) // 2 : len(known) // 2 + 1]  # np.median makes NaN of two infs
    median = float(middle[0]) if middle[0] == middle[-1] else float(middle.mean())
    return Spread(median=number(median), min=number(min(known)), max=number(max(known)), n=len(known))


def interval(estimate: stats.TInterval) -> Interval:
    """As compare.json has it."""
    return Interval(mean=number(estimate.mean), low=number(estimate.low), high=number(estimate.high), n=estimate.n)


def target_of(baseline: Group) -> float:
    """Median over the baseline's headline seeds of their best loss, times 1.01; NaN without such runs."""
    best = [record.best for record in baseline.sound.values()]
    return float(np.median(best)) * 1.01 if best else math.nan


def method(group: Group, against: Against) -> Method:
    """All numbers of one method."""
    is_baseline = group.label == against.baseline.label
    tried = _tried(group)
    config = group.records[0].config
    args = [str(word) for word in config.get("optimizer_args") or ()]
    sound, every = list(group.sound.values()), list(group.headline.values())
    final = spread(against.judge.final(record) for record in every)
    base = float(np.median([against.judge.base(record) for record in sound])) if sound else math.nan
    return Method(
        label=group.label,
        optimizer=str(config.get("optimizer", "?")),
        optimizer_args=dict(zip(args[::2], args[1::2], strict=False)),
        options=dict(group.options),
        is_baseline=is_baseline,
        tuned=group.tuned,
        rates=[_rate_point(rate, (group.label, rate.lr) in against.added) for rate in tried],
        best_lr=group.best.lr if group.best and tried else None,
        found_lrs=group.found,
        at_grid_edge=group.edge,
        suggested_lrs=group.suggested,
        n_runs=len(group.records),
        n_diverged=sum(not record.sound for record in group.records),
        tuning_seeds=[record.seed for record in group.rates[0].records] if group.rates else [],
        headline_seeds=sorted(group.headline),
        headline_diverged=len(every) - len(sound),
        final=final,
        vs_base_pct=None if final["median"] is None else number(100 * (float(final["median"]) / base - 1)),
        delta=None if is_baseline else delta(group, against.baseline, against.judge),
        steps_to_target=_to_target(group, against, lambda record: record.steps),
        seconds_to_target=_to_target(group, against, lambda record: record.seconds),
        seconds_per_step=spread(record.seconds_per_step for record in every),
        peak_memory_gib=spread(float(record.summary.get("peak_memory_gib") or math.nan) for record in every),
        log_auc=spread(record.log_auc for record in every),
        lr_basin=[basin(tried, against.best, tolerance) for tolerance in TOLERANCES if tried],
        octiles=[] if is_baseline else octiles(group, against.baseline),
        images=image_metrics(sound),
        curve=band(sound),
        samples=samples(every, against.root),
    )


def _tried(group: Group) -> Sequence[Rates]:
    """The rates that a method was run at; none where every run found one of its own."""
    return () if group.tests else group.rates


def delta(group: Group, baseline: Group, judge: Judge) -> Delta:
    """The paired difference at the end, with its verdict."""
    seeds = sorted(group.headline.keys() & baseline.headline.keys())
    ours, theirs = ([one.headline[seed] for seed in seeds] for one in (group, baseline))
    difference = stats.paired_delta(
        [judge.final(record) for record in ours], [judge.final(record) for record in theirs]
    )
    broke = [
        int(np.sign(judge.breakdown(mine) - judge.breakdown(other))) for mine, other in zip(ours, theirs, strict=True)
    ]
    word, suffixes = stats.paired_verdict(difference, broke), list(_suffixes(group, baseline, judge))
    if baseline.sound and not group.headline and group.records:
        word = "worse"  # nothing to compare is a finding, if it is because no learning rate worked
    return Delta(
        pct=interval(difference.pct),
        ended=interval(difference.ended),
        images_se_pct=number(judge.images_se_pct(group.sound, baseline.sound)),
        wins=difference.wins,
        pairs=[Pair(seed=seed, pct=number(pct)) for seed, pct in zip(seeds, difference.each, strict=True)],
        word=word,
        suffixes=suffixes,
        verdict="; ".join([word, *suffixes]),
        sentence=delta_sentence(group.label, baseline.label, difference, broke.count(1) - difference.lost, word),
    )


def _suffixes(group: Group, baseline: Group, judge: Judge) -> Iterable[str]:
    if not group.tuned or not baseline.tuned:
        yield NOT_TUNED_TEXT
    edges = [label for label, edge in ((group.label, group.edge), (baseline.label, baseline.edge)) if edge]
    if edges:
        yield f"{EDGE_TEXT} ({' and '.join(edges)})"
    for which in (group, baseline):
        runs = which.headline.values()
        endings = Counter(str(record.status) for record in runs if not record.sound)
        endings[ABOVE_BASE_TEXT] = sum(judge.breakdown(record) == 1 for record in runs)
        for ending, count in endings.items():
            if count:
                yield f"{count} of {len(runs)} seeds of {which.label} {ending}"
    if group.records and group.best is None:
        yield f"{group.label} diverged or failed at every learning rate"
    if group.headline and baseline.headline and not group.headline.keys() & baseline.headline.keys():
        yield "no common seeds"


def basin(rates: Sequence[Rates], best: float, tolerance: float) -> Basin:
    """See ``stats.lr_basin``."""
    width = stats.lr_basin([rate.lr for rate in rates], [rate.score for rate in rates], best, tolerance)
    return Basin(
        tolerance=tolerance,
        low=number(width.low),
        high=number(width.high),
        decades=number(width.decades),
        censored_low=width.censored_low,
        censored_high=width.censored_high,
    )


def octiles(group: Group, baseline: Group) -> list[Octile]:
    """The paired difference on each eighth of the timesteps."""
    ours, theirs = group.sound, baseline.sound
    seeds = [seed for seed in sorted(ours.keys() & theirs.keys()) if ours[seed].octiles and theirs[seed].octiles]
    rows = []
    for k in range(OCTILES):
        pairs = [(ours[seed].octiles[k], theirs[seed].octiles[k]) for seed in seeds]
        pairs = [pair for pair in pairs if not math.isnan(sum(pair))]
        if pairs:
            pct = stats.paired_delta([pair[0] for pair in pairs], [pair[1] for pair in pairs]).pct
            rows.append(Octile(octile=k, pct=interval(pct)))
    return rows


def band(records: Sequence[Record]) -> Band:
    """Median, range and interval of the loss at the steps that all runs measured."""
    steps = sorted(set.intersection(*(set(record.steps) for record in records))) if records else []
    curves = [dict(zip(record.steps, record.losses, strict=True)) for record in records]
    at = [[curve[step] for curve in curves] for step in steps]
    intervals = [stats.t_interval(values) for values in at]
    return Band(
        steps=steps,
        median=[number(float(np.median(values))) for values in at],
        mean=[number(estimate.mean) for estimate in intervals],
        low=[number(estimate.low) for estimate in intervals],
        high=[number(estimate.high) for estimate in intervals],
        min=[number(min(values)) for values in at],
        max=[number(max(values)) for values in at],
    )


def same_rates(groups: Sequence[Group], baseline: Group) -> list[SameRate]:
    """Every method against the baseline at the rates that both tried, over the tuning seeds they share."""
    theirs = {rate.lr: rate for rate in _tried(baseline)}
    rows = []
    for group in groups:
        for rate in _tried(group) if group is not baseline else ():
            if rate.lr in theirs:
                rows.append(_same_rate(group.label, rate, theirs[rate.lr]))
    return rows


def _same_rate(label: str, ours: Rates, theirs: Rates) -> SameRate:
    other = {record.seed: record.final for record in theirs.records}
    pairs = [(record.final, other[record.seed]) for record in ours.records if record.seed in other]
    pct = stats.paired_delta([pair[0] for pair in pairs], [pair[1] for pair in pairs]).pct
    return SameRate(
        method=label,
        lr=ours.lr,
        pct=interval(pct),
        method_diverged=ours.n_diverged,
        baseline_diverged=theirs.n_diverged,
    )


def _rate_point(rate: Rates, added: bool) -> RatePoint:
    sound = [record for record in rate.records if record.sound]
    return RatePoint(
        lr=rate.lr,
        score=number(rate.score),
        final=spread(record.final for record in rate.records),
        n_diverged=rate.n_diverged,
        n_runs=len(rate.records),
        added=added,
        dw_norm=spread(record.dw_norm for record in sound),
        update_rms=spread(record.scalars.get(UPDATE_RMS, math.nan) for record in sound),
        runs=[record.id for record in rate.records],
    )


def _to_target(group: Group, against: Against, along: Callable[[Record], Sequence[float]]) -> ToTarget:
    def values(of: Group) -> list[float]:
        return [record.to_target(against.target, along(record)) for record in of.headline.values()]

    ours = spread(values(group))
    mine, theirs = ours["median"], spread(values(against.baseline))["median"]
    speedup = theirs / mine if isinstance(mine, float) and isinstance(theirs, float) and mine > 0 else math.nan
    reached = sum(math.isfinite(value) for value in values(group))
    return ToTarget(spread=ours, reached=reached, speedup=number(speedup))


def image_metrics(records: Sequence[Record]) -> list[ComparedImageMetric]:
    """Main values of image metrics that all runs logged, at the last step and at the step with the lowest loss.

    What else a metric says (p-values, alarms) is no quantity that a mean or an interval could be taken of.
    """
    rows: list[ComparedImageMetric] = []
    shared = set.intersection(*(set(record.images) for record in records)) if records else set()
    for name in main_values(sorted(shared)):
        last = [record.images[name][-1] for record in records if record.images[name]]
        at_best = [value for record in records for value in record.images[name] if value.step == record.best_step]
        for at, values in (("final", last), ("best", at_best)):
            if len(values) == len(records):
                rows.append(_image_metric(name, at, values))
    return rows


def _image_metric(name: str, at: str, values: Sequence[ImageValue]) -> ComparedImageMetric:
    encoders = {value.encoder_id for value in values}
    counts = {value.images for value in values}
    return ComparedImageMetric(
        name=name,
        at="final" if at == "final" else "best",
        value=interval(stats.t_interval([value.value for value in values])),
        encoder_id=encoders.pop() if len(encoders) == 1 else None,
        images=counts.pop() if len(counts) == 1 else None,
    )


def samples(records: Sequence[Record], root: Path) -> Samples | None:
    """The images of the first run that drew some."""
    for record in records:
        rows = record.folder.sample_rows()[:MOST_SAMPLES]
        if rows:
            return _samples(record, rows, root)
    return None


def _samples(record: Record, rows: Sequence[Mapping[str, Any]], root: Path) -> Samples:
    steps = sorted({row["step"] for row in rows})
    curve = dict(zip(record.steps, record.losses, strict=True))
    cells = []
    for row in rows:
        file = record.folder.samples / row["file"]
        cells.append(
            Cell(
                step=row["step"],
                prompt_index=row["prompt_index"],
                image_index=row["image_index"],
                prompt=row["prompt"],
                seed=row["seed"],
                settings=list(motif_of(row).settings),
                file=relative(file, root) if is_regular(file) else None,
            )
        )
    return Samples(
        run=record.id,
        lr=record.lr,
        training_seed=record.seed,
        steps=steps,
        prompts=list(dict.fromkeys(cell["prompt"] for cell in cells)),
        losses={str(step): number(curve[step]) for step in steps if step in curve},
        cells=cells,
        references=[relative(file, root) for file in sorted(record.folder.reference_dir.glob("*.png"))],
    )


def run_row(record: Record, label: str, headline: bool, against: Against) -> RunRow:
    """One line of the table of runs."""
    report = record.folder.report_html
    link = relative(report, against.root)
    return RunRow(
        id=record.id,
        method=label,
        lr=record.lr,
        seed=record.seed,
        role="headline" if headline else "tuning",
        status=record.status,
        message=record.message,
        base=number(record.base),
        final=number(record.final),
        best=number(record.best),
        best_step=record.best_step,
        steps_to_target=number(record.to_target(against.target, record.steps)),
        seconds_to_target=number(record.to_target(against.target, record.seconds)),
        seconds_per_step=number(record.seconds_per_step),
        log_auc=number(record.log_auc),
        dw_norm=number(record.dw_norm),
        steps=list(record.steps),
        losses=[number(loss) for loss in record.losses],
        seconds=[number(round(value, 3)) for value in record.seconds],
        report=link if report.exists() and lies_below(link) else None,
        command=record.command,
    )


def relative(path: Path, root: Path) -> str:
    """As seen from ``root`` where it lies in it (links survive a move), else as it is."""
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
