"""Which runs a comparison needs: methods, grids of learning rates, seeds, folders, command lines. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora import registry
from dreamlora.cli.declared import Option, options_of
from dreamlora.cli.parse import parse_run
from dreamlora.compare.methods import OWN_OF_A_RUN
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.config.programs import PROGRAMS
from dreamlora.config.rates import default_rate
from dreamlora.config.run import AUTO
from dreamlora.errors import UserError
from dreamlora.eval_loss.price import FINAL_SIZES
from dreamlora.files import write_atomically
from dreamlora.reading import read_json
from dreamlora.runfolder import RunFolder
from dreamlora.schemas import OBJECT
from dreamlora.sweep.config import DECIDED_HERE, PROGRAM, CompareConfig, flags_in

RATIO = math.sqrt(10)
"""Between neighbouring learning rates."""


@dataclass(frozen=True)
class Effort:
    """How much is run when nothing else is said.

    Attributes:
        points: learning rates per method.
        extension: rates added where the best lies at an edge.
        rounds: how often that is done.
    """

    points: int
    seeds: tuple[int, ...]
    headline: int
    extension: int
    rounds: int


FULL = Effort(points=7, seeds=(0, 1, 2), headline=5, extension=2, rounds=2)
QUICK = Effort(points=3, seeds=(0,), headline=3, extension=1, rounds=1)


@dataclass(frozen=True)
class SweepMethod:
    """A method as the command line names it.

    Attributes:
        label: "adamw", "scaled_adamw:variant=split", "adamw+rank=16".
        words: the training flags that make it this method.
        usual_lr: the learning rate that it has when none is given.
        tests: whether each of its runs finds its rate by a range test ("adamw+learning_rate=auto").
    """

    label: str
    words: tuple[str, ...]
    usual_lr: float
    tests: bool = False

    @property
    def slug(self) -> str:
        """The label as a folder's name."""
        return re.sub(r"[^\w=.+-]+", "-", self.label)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        program: that trains, one of ``PROGRAMS``.
        rate: its learning rate, as the command line has it.
        argv: its flags, without the folder.
        folder: of the run; the same for the same method, rate and seed, whatever they are run for.
    """

    program: str
    method: str
    rate: str
    seed: int
    argv: tuple[str, ...]
    folder: Path

    @property
    def done(self) -> bool:
        """Whether it finished or diverged: what failed otherwise is tried again."""
        return RunFolder(self.folder).outcome().get("status") in ("finished", "diverged")


@dataclass(frozen=True)
class Sweep:
    """A comparison that is to be made.

    Attributes:
        program: that trains, one of ``PROGRAMS``.
        training: its flags that all methods share, as typed.
        settings: what they mean, by option: runs already in the folder must have been made with the same.
    """

    root: Path
    program: str
    entries: tuple[SweepMethod, ...]
    baseline: str | None
    training: tuple[str, ...]
    settings: dict[str, Any]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    headline_seeds: tuple[int, ...]
    effort: Effort

    @property
    def runs(self) -> Path:
        """The folder with all runs."""
        return self.root / "runs"

    def grid(self, entry: SweepMethod) -> list[float]:
        """The learning rates that a method is tried at first, ascending.

        Without ``--learning_rates`` all grids lie on one lattice, that of the first method's usual rate, and each is
        centred on the point nearest to the method's own usual rate: so that there are rates which several tried.
        A method that finds its rates has no grid: one entry stands for all that it finds.
        """
        if entry.tests:
            return [entry.usual_lr]
        if self.rates:
            return sorted(self.rates)
        anchor = self.entries[0].usual_lr
        centre = round(math.log(entry.usual_lr / anchor, RATIO))
        half = self.effort.points // 2
        return [_rounded(anchor * RATIO**k) for k in range(centre - half, centre + self.effort.points - half)]

    def tuning(self, entry: SweepMethod, rates: Sequence[float]) -> list[Job]:
        """The runs that choose a learning rate: no samples, no best step, and the curve's evaluation set alone."""
        less = ("--sample_steps", "0", "--no_save_best", "--final_eval_items", "0")
        return [self._job(entry, lr, seed, less) for seed in self.seeds for lr in rates]

    def headline(self, entry: SweepMethod, lr: float) -> list[Job]:
        """The runs that are compared: other seeds, with samples, and with the whole larger set, whatever it costs."""
        given = self.settings["final_eval_items"] is not None or "final_eval_items" in flags_in(entry.words)
        whole = () if given else ("--final_eval_items", str(FINAL_SIZES[0]))
        return [self._job(entry, lr, seed, whole) for seed in self.headline_seeds]

    def _job(self, entry: SweepMethod, lr: float, seed: int, more: tuple[str, ...]) -> Job:
        rate = AUTO if entry.tests else f"{lr:g}"
        own = ("--learning_rate", rate, "--seed", str(seed), *more)
        folder = self.runs / entry.slug / f"lr{rate if entry.tests else format(lr, '.6g')}" / f"seed{seed}"
        return Job(self.program, entry.label, rate, seed, (*self.training, *entry.words, *own), folder)


def extended(grid: Sequence[float], edge: str, count: int) -> list[float]:
    """``count`` rates beyond an end of the grid."""
    start, factor = (max(grid), RATIO) if edge == "high" else (min(grid), 1 / RATIO)
    return sorted(_rounded(start * factor**k) for k in range(1, count + 1))


def sweep_of(config: CompareConfig, training: Sequence[str]) -> Sweep:
    """What the command line asks for, with every flag and every method checked.

    Raises:
        UserError: a training flag, an optimizer or one of its settings is wrong, or nothing would be measured.
    """
    trained = PROGRAMS[config.program]
    base, _ = parse_run(training, trained, PROGRAM)
    if base.train.dry_run:
        raise UserError("--dry_run looks at the data of one run: give it to dreamlora dreambooth or text-to-image")
    if base.eval.eval_steps == 0:
        raise UserError("--eval_steps 0 leaves nothing to compare: leave the flag out, or give a number above 0")
    entries = tuple(parse_entry(text, training, trained) for text in config.optimizers)
    baseline = parse_entry(config.baseline, training, trained).label if config.baseline else None
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):
        raise UserError(f"--optimizers has a method twice: {' '.join(labels)}")
    if baseline is not None and baseline not in labels:
        raise UserError(f"--baseline must be one of --optimizers: {' '.join(labels)} (got {baseline})")
    effort = QUICK if config.quick else FULL
    seeds = config.seeds or effort.seeds
    wanted = effort.headline if config.headline_seeds is None else config.headline_seeds
    root = config.output_dir or Path("outputs") / "-vs-".join(entry.slug for entry in entries)
    return Sweep(
        root=root,
        program=config.program,
        entries=entries,
        baseline=baseline,
        training=(*_of_all_runs(base, training, root), *training),
        settings={
            "program": config.program,
            "processes_per_run": config.processes_per_run,
            **as_flat_dict(base),
        },
        rates=config.learning_rates,
        seeds=seeds,
        headline_seeds=tuple(range(max(seeds) + 1, max(seeds) + 1 + wanted)),
        effort=effort,
    )


def parse_entry(text: str, training: Sequence[str], trained: type[RunConfig]) -> SweepMethod:
    """``optimizer[:setting=value,...][+flag=value...]``, checked as the training's own command line.

    Args:
        training: its other flags.
        trained: all options of the program that trains.

    Raises:
        UserError: the form, the optimizer, a setting or a flag is wrong.
    """
    head, *flags = re.split(r"\+(?=[A-Za-z])", text)
    name, colon, settings = head.partition(":")
    try:
        optimizer = registry.check("optimizers", name)
    except UserError as error:
        raise UserError(f"--optimizers {text}: {error}") from None
    args = [_pair(text, pair) for pair in re.split(r",(?=\w+=)", settings)] if colon else []
    words = ["--optimizer", optimizer]
    if args:
        words += ["--optimizer_args", *(word for pair in args for word in pair)]
    for flag in flags:
        words += _flag_words(text, flag, options_of(trained))
    config, _ = parse_run([*training, *words], trained, PROGRAM)
    label = optimizer + (":" + ",".join(f"{key}={value}" for key, value in args) if args else "")
    label += "".join(f"+{flag}" for flag in flags)
    rate = config.optim.learning_rate
    if rate == AUTO:
        return SweepMethod(label, tuple(words), default_rate(config), tests=True)
    return SweepMethod(label, tuple(words), rate or default_rate(config))


def check_settings(sweep: Sweep) -> None:
    """Refuse a folder whose runs were made with other training flags; write down those of a new one.

    Raises:
        UserError: they differ; the message says in what. Or the file that tells is damaged.
    """
    file = sweep.root / "settings.json"
    now = {name: value for name, value in sweep.settings.items() if name not in OWN_OF_A_RUN}
    before = read_json(file, OBJECT, sweep.root) if file.exists() else {}
    names = [name for name in before if name in now and before[name] != now[name]]
    if names:
        changes = "; ".join(f"{name}: {before[name]!r} then, {now[name]!r} now" for name in names)
        raise UserError(
            f"the runs in {sweep.root} were made with other flags ({changes}): give the same, or another --output_dir"
        )
    write_atomically(file, json.dumps({**before, **now}, indent=1))


def _pair(text: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name or not value:
        raise UserError(f"--optimizers {text}: settings are written name=value, with commas between (got {pair!r})")
    return name, value


def _flag_words(text: str, flag: str, options: Mapping[str, Option]) -> list[str]:
    spelled, equals, value = flag.partition("=")
    name = spelled.replace("-", "_")
    tests = name == "learning_rate" and value.lower() == AUTO
    if (name in DECIDED_HERE and not tests) or name == "output_dir":
        raise UserError(f"--optimizers {text}: {name} cannot differ between methods")
    if name in options and options[name].several and equals:
        return [f"--{name}", *value.split(",")]
    return [f"--{name}={value}"] if equals else [f"--{name}"]


def _of_all_runs(base: RunConfig, training: Sequence[str], root: Path) -> list[str]:
    """Flags of every run that the user has not given.

    No checkpoints; class images for all in one place.
    """
    words = [] if "checkpointing_steps" in flags_in(training) else ["--checkpointing_steps", "0"]
    if base.data.with_prior_preservation and base.data.class_data_dir is None:
        words += ["--class_data_dir", str(root / "class_images")]
    return words


def _rounded(lr: float) -> float:
    return float(f"{lr:.3g}")
