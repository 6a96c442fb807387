"""Are the verdicts of `dreamlora compare` right as often as they say? AdamW against itself, and against a worse AdamW.

    python benchmarks/compare_calibration.py

`dreamlora compare` trains the embedded model with AdamW, at its usual rate and with --seeds seeds for the headline; and
with an AdamW that is worse on purpose, because it makes fewer steps (--worse_steps). Losses and verdicts are those of
the program's own headline runs, on draws from them:

- itself: random halves of the seeds against each other, --draws times. Better or worse is a false alarm.
- worse: AdamW with fewer steps against AdamW, five seeds in common, as many as `dreamlora compare` runs by default.
- worse_unpaired: the same, but no seed in common, so that pairing does not help.

The runs lie in --output_dir; what is there is not made again.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _cli
import _machine
import numpy as np

from dreamlora.compare import stats
from dreamlora.compare.endings import judge_of
from dreamlora.compare.records import Record, read_record
from dreamlora.sweep import command, plan

RATE = 2e-3
TUNING_SEED = 0


def make_pools(args: argparse.Namespace) -> tuple[dict[int, Record], dict[int, Record]]:
    """Headline runs of AdamW and of the worse AdamW, by seed."""
    worse = f"adamw+max_train_steps={args.worse_steps}"
    command.main(
        [
            *["--optimizers", "adamw", worse, "--learning_rates", str(RATE)],
            *["--seeds", str(TUNING_SEED), "--headline_seeds", str(args.seeds)],
            *["--max_train_steps", str(args.steps), "--no_with_prior_preservation"],
            *["--eval_steps", str(args.steps), "--sample_steps", "0", "--no_save_best"],  # only the end is needed
            *["--workers", str(args.workers), "--output_dir", str(args.output_dir)],
        ]
    )
    records = [read_record(file.parent, file.parent.name) for file in args.output_dir.rglob("outcome.json")]
    pools: dict[str | None, dict[int, Record]] = {"adamw": {}, worse: {}}
    for record in records:
        if record.seed != TUNING_SEED:
            pools.setdefault(record.method, {})[record.seed] = record
    return pools["adamw"], pools[worse]


def halves(losses: np.ndarray, size: int, orders: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Disjoint groups of ``size`` runs, one couple for each random order."""
    return [(losses[order[:size]], losses[order[size : 2 * size]]) for order in orders]


def verdicts(runs: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """How often each word is said of (losses, baseline)."""
    words = [stats.verdict(stats.paired_delta(ours.tolist(), theirs.tolist()).pct) for ours, theirs in pairs]
    return {"runs_per_side": runs, "verdicts": dict(Counter(words))}


def calibrate(good: dict[int, Record], bad: dict[int, Record], draws: int) -> dict[str, Any]:
    """All figures of the result, from runs of the same seeds."""
    rng = np.random.default_rng(0)
    judge = judge_of([*good.values(), *bad.values()])
    seeds = sorted(good.keys() & bad.keys())
    ours, theirs = (np.array([judge.final(runs[seed]) for seed in seeds]) for runs in (bad, good))
    default = plan.FULL.headline
    picks = [rng.choice(len(seeds), default, replace=False) for _ in range(draws)]
    orders = [rng.permutation(len(seeds)) for _ in range(draws)]
    handicap = stats.paired_delta(ours.tolist(), theirs.tolist()).pct
    return {
        "evaluation": {"items": judge.items, "images": judge.images},
        "base_loss": judge.base(good[seeds[0]]),
        "final_losses": theirs.round(6).tolist(),
        "final_losses_worse": ours.round(6).tolist(),
        "sd_pct": 100 * float(np.std(np.log(theirs), ddof=1)),
        "paired_sd_pct": 100 * float(np.std(np.log(ours / theirs), ddof=1)),
        "itself": verdicts(len(seeds) // 2, halves(theirs, len(seeds) // 2, orders)),
        "itself_default_size": verdicts(default, halves(theirs, default, orders)),
        "worse_by_pct": [handicap.mean, handicap.low, handicap.high],
        "worse": verdicts(default, [(ours[pick], theirs[pick]) for pick in picks]),
        "worse_unpaired": verdicts(
            default, [(ours[order[:default]], theirs[order[default : 2 * default]]) for order in orders]
        ),
    }


def main() -> None:
    """Make the runs that are missing, draw, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="runs of each, at least 20")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--worse_steps", type=int, default=20, help="of a run that is worse on purpose")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--workers", type=int, default=_machine.usable_cores())
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare-calibration"))
    parser.add_argument("--results_dir", type=Path, default=_machine.RESULTS)
    args = parser.parse_args()
    if args.seeds < 20:
        parser.error("--seeds must be at least 20")
    started = time.perf_counter()
    good, bad = make_pools(args)
    result = {
        "command": _machine.command("compare_calibration.py"),
        "settings": {"seeds": args.seeds, "steps": args.steps, "worse_steps": args.worse_steps, "draws": args.draws},
        "results": calibrate(good, bad, args.draws),
        "seconds": round(time.perf_counter() - started, 1),
        "machine": _machine.describe(1),
    }
    print(_machine.write("compare_calibration", result, args.results_dir))


if __name__ == "__main__":
    _cli.start(main)
