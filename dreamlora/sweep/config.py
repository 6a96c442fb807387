"""``dreamlora compare``: the flags, and what they mean for the training flags that stand beside them. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from dreamlora.cli.declared import options_of
from dreamlora.cli.given import divided, flag_in
from dreamlora.cli.parse import Program
from dreamlora.cli.parse import parse as parse_flags
from dreamlora.errors import UserError

PROGRAM = "dreamlora compare"

DECIDED_HERE = {
    "optimizer": "give --optimizers",
    "optimizer_args": "give them with the optimizer: --optimizers scaled_adamw:variant=split",
    "learning_rate": "give --learning_rates, or for a range test a method adamw+learning_rate=auto",
    "seed": "give --seeds",
    "resume_from_checkpoint": "the same command goes on where it was stopped",
    "overwrite_output_dir": "give another --output_dir, or remove the old one",
    "push_to_hub": "upload the run that you choose afterwards",
    "hub_token": "nothing is uploaded",
    "hub_model_id": "nothing is uploaded",
}
"""Training flags that a comparison sets itself, and what to give instead."""


@dataclass(frozen=True)
class CompareConfig:
    """Which optimizer is better, each at its own best learning rate? Flags of the training may stand beside; see
    dreamlora dreambooth --help."""

    optimizers: tuple[str, ...] = ()
    """Methods: an optimizer, its settings after a colon, other training flags after a plus, such as adamw
    scaled_adamw:variant=split adamw+rank=16."""
    program: Literal["dreambooth", "text-to-image"] = "dreambooth"
    """What is trained: dreamlora dreambooth or dreamlora text-to-image."""
    learning_rates: tuple[float, ...] = ()
    """Rates for all of them. Default: 7 (--quick: 3), a factor of sqrt(10) apart, around each one's usual rate; more
    where the best lies at the edge."""
    seeds: tuple[int, ...] = ()
    """Seeds that choose the learning rate. Default: 0 1 2 (--quick: 0)."""
    headline_seeds: int | None = None
    """How many other seeds are then run at the best rate; 0: none. Default: 5 (--quick: 3)."""
    quick: bool = False
    """Fewer rates and seeds: a first look, with wide intervals."""
    runs: tuple[Path, ...] = ()
    """Compare these run folders (or folders of run folders) instead of training."""
    baseline: str | None = None
    """The method that the others are compared with. Default: adamw if it is there, else the first."""
    output_dir: Path | None = None
    """Where runs and report go. Default: outputs/<names of the methods>, with --runs outputs/comparison."""
    workers: int | None = None
    """Runs at the same time. Default: one per GPU; without one, one per core for an embedded model and else one;
    fewer with --processes_per_run."""
    processes_per_run: int = 1
    """Processes that share a run, each with a GPU of its own (or on the CPU): for runs that are too slow on one. As
    under accelerate launch, --train_batch_size is per process."""

    def __post_init__(self) -> None:
        if bool(self.optimizers) == bool(self.runs):
            raise UserError("give either --optimizers, to train, or --runs, to compare runs that exist")
        for option in fields(self):
            used = option.name in ("optimizers", "runs", "baseline", "output_dir")
            if self.runs and not used and getattr(self, option.name) != option.default:
                raise UserError(f"--{option.name} is for training: with --runs the runs exist already. Leave it out")
        if any(not 0 < lr < float("inf") for lr in self.learning_rates):
            raise UserError(f"--learning_rates must be above 0 (got {' '.join(map(str, self.learning_rates))})")
        if any(seed < 0 for seed in self.seeds):
            raise UserError(f"--seeds must be at least 0 (got {' '.join(map(str, self.seeds))})")
        for name in ("learning_rates", "seeds", "optimizers"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"--{name} has a value twice: {' '.join(map(str, values))}")
        for name, lowest in (("headline_seeds", 0), ("workers", 1), ("processes_per_run", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"--{name} must be at least {lowest} (got {value})")


def parse(argv: Sequence[str]) -> tuple[CompareConfig, list[str]]:
    """The comparison's own options, and the words that are training flags (checked later, method by method).

    Raises:
        UserError: a flag of the comparison is wrong, or a training flag is one that the comparison decides.
    """
    mine, training = divided(argv, options_of(CompareConfig))
    for name in DECIDED_HERE:
        if name in flags_in(training):
            raise UserError(f"--{name} is decided by the comparison: {DECIDED_HERE[name]}")
    config = parse_flags(CompareConfig, mine, Program(PROGRAM))
    if config.runs and training:
        raise UserError(f"{training[0]} trains nothing: with --runs the runs exist already. Leave it out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("start dreamlora compare with plain python: it starts a process per GPU itself")
    return config, training


def flags_in(words: Sequence[str]) -> set[str]:
    """The names of all flags among the words of a command line."""
    return {name for name in map(flag_in, words) if name is not None}
