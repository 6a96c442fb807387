"""How a method's one setting and rate are found, how it is tested, and what is tried besides so that the best is known.

Everything a method is tuned by is its own and the baseline's: more methods cost their own trainings alone.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from _robustness import Bench, Cell, Config, Method, Row, Task, gain, loss, three_digits
from _robustness_scores import Tested

MOST_RATES = 12
"""Of a grid; it would have to grow by a factor of 1000 on one side."""
SAME_SPEED = 0.1
"""Steps that cost so little more or less than the baseline's get no other number of them."""


@dataclass(frozen=True)
class Effort:
    """How much is trained.

    Attributes:
        points: rates of a grid at first.
        grows: whether grids grow until no optimum lies at an edge, and are refined around the chosen rate.
        seeds: of the test; the first one also of whatever is tried besides.
        factor: between neighbours of a grid.
        tuning_seed: of the tuning.
    """

    points: int
    grows: bool
    seeds: tuple[int, ...]
    factor: float = 2.0
    tuning_seed: int = 0


@dataclass(frozen=True)
class Choice:
    """What was chosen for a method, and by what.

    Attributes:
        tried: the merit of every setting and rate that all tuning cells have: the worst cell's gain, in units of the
            baseline's best there.
    """

    config: Config
    tried: Mapping[Config, float]


Grid = dict[float | None, float]
"""Gain by rate."""


def tune(bench: Bench, methods: Sequence[Method], cells: Sequence[Cell], effort: Effort) -> dict[Method, Choice]:
    """Every method's one setting and rate: those with the best worst cell.

    The baseline is the first method. Grids grow, in every cell by itself, until its best rate is not at their end, and
    in all cells until the best worst cell is not; then come the two rates half a step beside it.
    """
    rates: dict[tuple[Method, str, Cell], set[float | None]] = {
        (method, setting, cell): set(method.first_rates(effort.points, effort.factor))
        for method in methods
        for setting in method.settings
        for cell in cells
    }
    while True:
        grids = _grids(bench, rates, effort.tuning_seed)
        merits = _merits(grids, methods, cells)
        more = _growth(grids, merits, cells, effort.factor) if effort.grows else {}
        if not any(more.values()):
            break
        for key, new in more.items():
            rates[key] |= new
    if effort.grows:
        for method in methods:
            best = _best(merits, method)
            for cell in cells:
                rates[method, best.setting, cell] |= _beside(best.rate, effort.factor)
        merits = _merits(_grids(bench, rates, effort.tuning_seed), methods, cells)
    return {
        method: Choice(_best(merits, method), {c: merit for c, merit in merits.items() if c.method == method})
        for method in methods
    }


def _grids(
    bench: Bench, rates: Mapping[tuple[Method, str, Cell], set[float | None]], seed: int
) -> dict[tuple[Method, str, Cell], Grid]:
    tasks = {
        (key, rate): bench.task(key[2], Config(key[0], key[1], rate), seed)
        for key, of_key in rates.items()
        for rate in sorted(of_key, key=lambda rate: rate or 0.0)
    }
    rows = bench.run(tasks.values(), "tuning")
    return {key: {rate: gain(rows[tasks[key, rate]]) for rate in of_key} for key, of_key in rates.items()}


def _merits(
    grids: Mapping[tuple[Method, str, Cell], Grid], methods: Sequence[Method], cells: Sequence[Cell]
) -> dict[Config, float]:
    """By all that was tried in all cells."""
    baseline = methods[0]
    best = {cell: max(max(grids[baseline, s, cell].values()) for s in baseline.settings) for cell in cells}
    found = {}
    for method in methods:
        for setting in method.settings:
            common = set.intersection(*(set(grids[method, setting, cell]) for cell in cells))
            for rate in common:
                gains = (grids[method, setting, cell][rate] / best[cell] for cell in cells)
                found[Config(method, setting, rate)] = min(gains)
    return found


def _best(merits: Mapping[Config, float], method: Method) -> Config:
    return max((config for config in merits if config.method == method), key=lambda config: _preferred(merits, config))


def _preferred(merits: Mapping[Config, float], config: Config) -> tuple[float, float]:
    """Among equals the lower rate, as where everything broke off."""
    return merits[config], -(config.rate or 0.0)


def _growth(
    grids: Mapping[tuple[Method, str, Cell], Grid],
    merits: Mapping[Config, float],
    cells: Sequence[Cell],
    factor: float,
) -> dict[tuple[Method, str, Cell], set[float | None]]:
    more = {key: beyond(grid, factor) for key, grid in grids.items()}
    for method, setting in dict.fromkeys((config.method, config.setting) for config in merits):
        mine = {c.rate: merit for c, merit in merits.items() if (c.method, c.setting) == (method, setting)}
        for rate in beyond(mine, factor):
            for cell in cells:
                if rate not in grids[method, setting, cell]:
                    more[method, setting, cell] |= {rate}
    return more


def beyond(grid: Grid, factor: float) -> set[float | None]:
    """The next rate of a grid whose best is at an end; none if it is not, or the grid is as long as one may be."""
    rates = sorted(rate for rate in grid if rate is not None)
    if not rates or len(rates) >= MOST_RATES:
        return set()
    best = max(rates, key=lambda rate: (grid[rate], -rate))
    lower = {three_digits(rates[0] / factor)} if best == rates[0] else set()
    return lower | ({three_digits(rates[-1] * factor)} if best == rates[-1] else set())


def _beside(rate: float | None, factor: float) -> set[float | None]:
    """The two rates half a step away."""
    return set() if rate is None else {three_digits(rate * factor**power) for power in (-0.5, 0.5)}


@dataclass(frozen=True)
class Test:
    """All trainings of the test.

    Attributes:
        frozen: rows by method, cell and seed.
        searched: rows of the first seed by method, cell and rate.
        tested: losses of everything that has all seeds.
        shorter: what it does to the loss to have the seconds of the baseline; only of those that differ from it.
    """

    frozen: Mapping[tuple[Method, Cell], Sequence[Row]]
    searched: Mapping[tuple[Method, Cell], Mapping[float | None, Row]]
    tested: Tested
    shorter: Mapping[tuple[Method, Cell], float]


def test(bench: Bench, chosen: Mapping[Method, Choice], cells: Sequence[Cell], effort: Effort) -> Test:
    """Every method in every cell with its frozen setting and rate, all seeds; then each tuned in every single cell.

    The tuning of single cells is with one seed, so that the lowest of its losses is low by luck as well. What leads in
    a cell (the best of the two best methods) is therefore trained with all seeds before anything is called the best.
    """
    configs = {method: choice.config for method, choice in chosen.items()}
    frozen = run_frozen(bench, configs, cells, effort)
    searched = _search(bench, configs, cells, effort)
    leaders = {cell: _leaders(frozen, searched, configs, cell) for cell in cells}
    more = {
        (cell, config): [bench.task(cell, config, seed) for seed in effort.seeds]
        for cell, each in leaders.items()
        for config in each
    }
    rows = bench.run((task for each in more.values() for task in each), "the best")
    losses = {cell: {configs[method]: _losses(frozen[method, cell]) for method in configs} for cell in cells}
    for (cell, config), each in more.items():
        losses[cell][config] = _losses([rows[task] for task in each])
    base = {cell: float(frozen[next(iter(configs)), cell][0]["base"]) for cell in cells}
    return Test(frozen, searched, Tested(base, losses, configs), _shorter(bench, configs, frozen, effort))


def run_frozen(
    bench: Bench, configs: Mapping[Method, Config], cells: Sequence[Cell], effort: Effort
) -> dict[tuple[Method, Cell], list[Row]]:
    """Rows of all seeds by method and cell."""
    tasks = {
        (method, cell): [bench.task(cell, config, seed) for seed in effort.seeds]
        for method, config in configs.items()
        for cell in cells
    }
    by_seed = itertools.chain.from_iterable(zip(*tasks.values(), strict=True))  # so that fewer seeds are soon complete
    rows = bench.run(by_seed, "test")
    return {key: [rows[task] for task in each] for key, each in tasks.items()}


def _losses(rows: Sequence[Row]) -> tuple[float, ...]:
    return tuple(loss(row) for row in rows)


def _search(
    bench: Bench, configs: Mapping[Method, Config], cells: Sequence[Cell], effort: Effort
) -> dict[tuple[Method, Cell], dict[float | None, Row]]:
    """Around the frozen rate, and on until the best is inside."""
    rates: dict[tuple[Method, Cell], set[float | None]] = {
        (method, cell): {config.rate} for method, config in configs.items() for cell in cells
    }
    if effort.grows:
        for key, of_key in rates.items():
            rate = configs[key[0]].rate
            of_key |= set() if rate is None else {three_digits(rate * effort.factor**power) for power in (-1, 1)}
    while True:
        tasks: dict[tuple[Method, Cell], dict[float | None, Task]] = {
            (method, cell): {
                rate: bench.task(cell, replace(configs[method], rate=rate), effort.seeds[0]) for rate in of_key
            }
            for (method, cell), of_key in rates.items()
        }
        rows = bench.run((task for each in tasks.values() for task in each.values()), "in every cell")
        found = {key: {rate: rows[task] for rate, task in each.items()} for key, each in tasks.items()}
        more = {
            key: beyond({rate: gain(row) for rate, row in each.items()}, effort.factor) for key, each in found.items()
        }
        if not effort.grows or not any(more.values()):
            return found
        for key, new in more.items():
            rates[key] |= new


def _leaders(
    frozen: Mapping[tuple[Method, Cell], Sequence[Row]],
    searched: Mapping[tuple[Method, Cell], Mapping[float | None, Row]],
    configs: Mapping[Method, Config],
    cell: Cell,
) -> list[Config]:
    """The best of the two best methods, where it is not what was frozen: by the first seed, whose luck is taken off."""
    off = luck(frozen, cell)
    candidates = []
    for method, config in configs.items():
        rows = frozen[method, cell]
        known = {rate: loss(row) - off for rate, row in searched[method, cell].items()}
        known[config.rate] = _mean_loss(rows)
        rate = min(known, key=lambda rate: known[rate])
        candidates.append((known[rate], replace(config, rate=rate)))
    candidates.sort(key=lambda candidate: candidate[0])
    return [config for _, config in candidates[:2] if config != configs[config.method]]


def luck(frozen: Mapping[tuple[Method, Cell], Sequence[Row]], cell: Cell) -> float:
    """By how much the first seed's loss is above the mean over the seeds.

    The median over the methods: one of them that goes wrong with one seed says nothing about the others.
    """
    above = (loss(rows[0]) - _mean_loss(rows) for (_, at), rows in frozen.items() if at == cell)
    finite = [value for value in above if math.isfinite(value)]
    return statistics.median(finite) if finite else 0.0


def _mean_loss(rows: Sequence[Row]) -> float:
    return statistics.fmean(map(loss, rows))


def step_ratio(
    frozen: Mapping[tuple[Method, Cell], Sequence[Row]], method: Method, baseline: Method, cell: Cell
) -> float:
    """Seconds of a step, to the baseline's in the same cell."""
    ours, theirs = (sum(row["step_s"] for row in frozen[one, cell]) for one in (method, baseline))
    return ours / theirs if theirs else 1.0


def _shorter(
    bench: Bench,
    configs: Mapping[Method, Config],
    frozen: Mapping[tuple[Method, Cell], Sequence[Row]],
    effort: Effort,
) -> dict[tuple[Method, Cell], float]:
    """What it does to the loss to have as many seconds as the baseline: trainings of fewer (or more) steps, with a
    schedule of their own, against the first seed's."""
    baseline = next(iter(configs))
    tasks = {}
    for method, cell in frozen:
        ratio = step_ratio(frozen, method, baseline, cell)
        if abs(ratio - 1) > SAME_SPEED:
            other = replace(cell, steps=max(1, round(cell.steps / ratio)))
            tasks[method, cell] = bench.task(other, configs[method], effort.seeds[0])
    rows = bench.run(tasks.values(), "in the same time")
    apart = {key: loss(rows[task]) - loss(frozen[key][0]) for key, task in tasks.items()}
    return {key: value for key, value in apart.items() if not math.isnan(value)}
