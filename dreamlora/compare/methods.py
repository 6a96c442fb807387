"""Runs become methods: which belong together, which learning rate is a method's best, which seeds are compared."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np

from dreamlora.compare.records import Record
from dreamlora.compare.schema import Dropped, Edge
from dreamlora.config import as_flat_dict
from dreamlora.config.measuring import Encoders, Eval, Sample
from dreamlora.config.programs import PROGRAMS, program_of
from dreamlora.config.publishing import Label
from dreamlora.errors import UserError

OWN_OF_A_RUN = {
    *("seed", "learning_rate", "text_encoder_lr", "optimizer", "optimizer_args"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank", "checkpointing_steps"),
    *("checkpoints_total_limit", "report_to", "logging_dir", "dataloader_num_workers", "push_to_hub", "hub_token"),
    *("hub_model_id", "cache_dir", "latents_cache_dir", "class_data_dir", "sample_batch_size", "save_format"),
    *("tracker_project_name", "tracker_run_name", "parity_check", "parity"),
    *("vram", "gradient_checkpointing", "offload_blocks", "text_encoder_device"),
    *("compile", "attention_backend", "channels_last", "enable_xformers_memory_efficient_attention"),
    *(
        "prior_generation_precision",
        *(option.name for part in (Sample, Eval, Encoders, Label) for option in fields(part)),
    ),
} - {"eval_seed", "early_stopping"}
"""Options that may differ between runs of one method: the learning rate, the seed, what training does not see, and
where and how the same numbers are computed, but for rounding.
"""


@dataclass(frozen=True)
class Rates:
    """A method's runs at one learning rate that count for choosing it.

    Attributes:
        score: median final loss, runs without one as inf.
    """

    lr: float
    records: tuple[Record, ...]

    @property
    def score(self) -> float:
        return float(np.median([record.final for record in self.records]))

    @property
    def n_diverged(self) -> int:
        return sum(not record.sound for record in self.records)


@dataclass(frozen=True)
class Group:
    """All ended runs of one method.

    Attributes:
        rates: ascending; each with the same seeds.
        best: the rate with the lowest score; None if most runs of every rate diverged or failed.
        headline: runs at the best rate, by seed, that the comparison is made of.
        fresh: whether no rate was chosen by the headline's seeds.
        dropped: runs that are left out.
    """

    label: str
    records: tuple[Record, ...]
    rates: tuple[Rates, ...]
    best: Rates | None
    headline: Mapping[int, Record]
    fresh: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[Dropped, ...] = ()

    @property
    def tuned(self) -> bool:
        """Whether more than one rate was tried, by the method's own runs if they do that by themselves."""
        return len(self.rates) > 1 or self.tests

    @property
    def tests(self) -> bool:
        """Whether each of its runs found its rate by a range test. The one rate of ``rates`` is the middle of these."""
        return bool(self.records) and all(record.tested for record in self.records)

    @property
    def found(self) -> list[float]:
        """The rates that its runs found, ascending; none where they were given."""
        return sorted(record.lr for record in self.records) if self.tests else []

    @property
    def edge(self) -> Edge | None:
        """Whether the best rate is the lowest or the highest that was tried, so that a better one may lie beyond."""
        if self.best is None or len(self.rates) < 2:
            return None
        return "low" if self.best is self.rates[0] else "high" if self.best is self.rates[-1] else None

    @property
    def suggested(self) -> list[float]:
        """Two rates beyond the edge, as far apart as those at it."""
        if self.edge is None:
            return []
        lrs = [rate.lr for rate in self.rates]
        last, inner = (lrs[0], lrs[1]) if self.edge == "low" else (lrs[-1], lrs[-2])
        return [float(f"{last * (last / inner) ** k:.3g}") for k in (1, 2)]

    @property
    def sound(self) -> dict[int, Record]:
        """Headline runs that have a loss at their end, by seed."""
        return {seed: record for seed, record in self.headline.items() if record.sound}


def labelled(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by method, in the order of first appearance.

    A method is an optimizer with its settings, and those options that differ between runs of the same optimizer:
    "adamw", "scaled_adamw:variant=split", "adamw+rank=4".
    """
    by_optimizer: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_optimizer[_optimizer_label(record)].append(record)
    methods: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        label = _optimizer_label(record)
        alike = by_optimizer[label]
        usual = {name: _most_common(alike, name) for name in _varying(alike)}
        own = [
            f"+{name}={_value_text(_option(record, name))}" for name in usual if _option(record, name) != usual[name]
        ]
        methods[record.method or label + "".join(own)].append(record)
    return dict(methods)


def differing_options(methods: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, str]]:
    """By method, the options that are not the same in all methods (besides the optimizer and its rate)."""
    names = _varying([record for records in methods.values() for record in records])
    return {
        label: {name: _value_text(_option(records[0], name)) for name in names} for label, records in methods.items()
    }


def shared_options(records: Sequence[Record]) -> dict[str, str]:
    """The options that decide the training and are the same in all runs."""
    varying = _varying(records)
    config = records[0].config
    return {name: _value_text(config[name]) for name in config if name not in OWN_OF_A_RUN and name not in varying}


def group(label: str, records: Sequence[Record], fresh_seeds: Collection[int] | None) -> Group:
    """Choose the best learning rate of a method and the runs that speak for it.

    Every rate is judged by the same seeds: those that all rates have. A run with another seed, at a rate that is not
    the best, is dropped. Runs that found their rates themselves are taken together: their rates are the method's doing.

    Args:
        label: of the method.
        records: its ended runs.
        fresh_seeds: seeds kept for the headline. None: those that occur at one rate alone, if there are several rates.

    Raises:
        UserError: no seed is common to all rates.
    """
    at: dict[float, dict[int, Record]] = defaultdict(dict)
    together = bool(records) and all(record.tested for record in records)
    middle = float(f"{np.median([record.lr for record in records]):.3g}") if together else None
    for record in sorted(records, key=lambda record: (record.lr, record.seed, record.id)):
        at[middle or record.lr][record.seed] = record
    if fresh_seeds is None:
        rates_of = Counter(seed for runs in at.values() for seed in runs)
        fresh_seeds = {seed for seed, count in rates_of.items() if count == 1} if len(at) > 1 else set()
    tuning = {lr: set(runs) - set(fresh_seeds) for lr, runs in at.items()}
    if not any(tuning.values()):
        tuning, fresh_seeds = {lr: set(runs) for lr, runs in at.items()}, set()
    tried = {lr: seeds for lr, seeds in tuning.items() if seeds}
    common = set.intersection(*tried.values()) if tried else set()
    if tried and not common:
        raise UserError(
            f"{label}: no seed was run at all of its learning rates ({', '.join(f'{lr:g}' for lr in tried)}), so they "
            "cannot be compared: run the missing seeds, or leave a learning rate out"
        )
    rates = tuple(Rates(lr, tuple(at[lr][seed] for seed in sorted(common))) for lr in sorted(tried))
    best = min(rates, key=lambda rate: rate.score, default=None)
    if best is None or not math.isfinite(best.score):
        best = None
    headline = {} if best is None else {seed: run for seed, run in at[best.lr].items() if seed in fresh_seeds}
    fresh = bool(headline)
    if best is not None and not fresh:
        headline, fresh = dict(at[best.lr]), together
    used = {record.id for rate in rates for record in rate.records} | {record.id for record in headline.values()}
    dropped = tuple(
        Dropped(run=record.id, reason="its seed was not run at all learning rates of its method")
        for record in records
        if record.id not in used
    )
    return Group(label, tuple(records), rates, best, headline, fresh, dropped=dropped)


def _optimizer_label(record: Record) -> str:
    """``scaled_adamw:variant=split`` from the options ``optimizer`` and ``optimizer_args``, and how it has its rate."""
    config = record.config
    args = [str(word) for word in config.get("optimizer_args") or ()]
    pairs = [f"{name}={value}" for name, value in zip(args[::2], args[1::2], strict=False)]
    own = (":" + ",".join(pairs) if pairs else "") + ("+learning_rate=auto" if record.tested else "")
    return str(config.get("optimizer", "?")) + own


def _varying(records: Sequence[Record]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record.config if name not in OWN_OF_A_RUN)
    return [name for name in names if len({repr(_option(record, name)) for record in records}) > 1]


def _most_common(records: Sequence[Record], name: str) -> Any:
    counts = Counter(repr(_option(record, name)) for record in records)
    usual = counts.most_common(1)[0][0]
    return next(value for record in records if repr(value := _option(record, name)) == usual)


def _option(record: Record, name: str) -> Any:
    """An option's value; of a run that is older than the option, its default."""
    known = record.config
    return known[name] if name in known else _defaults(program_of(known).COMMAND).get(name)


@cache
def _defaults(command: str) -> dict[str, Any]:
    return as_flat_dict(PROGRAMS[command]())


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "default"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
