"""Trainings whose settings differ from cell to cell: what one is, how it is made, and how what was made is kept.

Shared by robustness.py and real_robustness.py. Methods are written as ``dreamlora compare --optimizers`` takes them.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dreamlora.config import PROGRAMS
from dreamlora.errors import DivergedError, UserError
from dreamlora.jsonl import append_jsonl, read_jsonl
from dreamlora.schemas import OBJECT

PROGRAM = "dreambooth"
MEASURED = (
    *("--no_train_text_encoder", "--no_with_prior_preservation", "--sample_steps", "0", "--checkpointing_steps", "0"),
    *("--final_eval_items", "0", "--no_save_best", "--no_parity_check"),
)
"""Of every training: the denoiser's LoRA alone, measured by the evaluation loss at both ends and by nothing else."""
LAYERS = {"attention": "attn", "all": "all"}
"""What ``--lora_layers`` is given. "all" has the convolutions of a UNet; a flow transformer has none, so that there it
is all linear layers of its blocks."""
UNTIMED = 2
"""First steps, in which memory is taken and kernels are chosen."""
MOST_PER_POOL = 200
"""Trainings, whose leftovers ``gc.freeze`` keeps, before processes are new ones. A pool's own ``max_tasks_per_child``
waits for ever once all its processes have made theirs (python/cpython#115634)."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Settings that a person may choose without thinking of the learning rate.

    Attributes:
        alpha: the same for all ranks, or None for the rank itself.
        start: spread of A's entries, as ``--init`` has it.
        layers: one of ``LAYERS``.
        decay: 0, or None for the optimizer's own.
    """

    subject: str
    rank: int
    alpha: int | None
    start: str
    layers: str
    steps: int
    decay: float | None

    def __str__(self) -> str:
        alpha, decay = self.alpha or self.rank, "own" if self.decay is None else f"{self.decay:g}"
        return f"{self.subject} r{self.rank} alpha{alpha} {self.start} {self.layers} {self.steps} steps decay-{decay}"

    @property
    def words(self) -> list[str]:
        """The flags that make it, all but the subject's."""
        decay = [] if self.decay is None else ["--adam_weight_decay", f"{self.decay:g}"]
        return (
            f"--rank {self.rank} --lora_alpha {self.alpha or self.rank} --init {self.start} "
            f"--lora_layers {LAYERS[self.layers]} --max_train_steps {self.steps} --eval_steps {self.steps}"
        ).split() + decay


@dataclass(frozen=True)
class Method:
    """An optimizer that is to be judged.

    Attributes:
        entry: as ``dreamlora compare --optimizers`` takes it.
        settings: values of its momentum or betas, one of which is chosen with the rate.
        middle: of its first rates; None: the run finds its rate (``--learning_rate auto``).
    """

    entry: str
    settings: tuple[str, ...]
    middle: float | None

    @property
    def label(self) -> str:
        return self.entry if self.middle else f"{self.entry}+learning_rate=auto"

    def entry_with(self, setting: str) -> str:
        """The entry with a setting among the optimizer's own."""
        head, plus, flags = self.entry.partition("+")
        return f"{head}{',' if ':' in head else ':'}{setting}{plus}{flags}"

    def first_rates(self, points: int, factor: float) -> list[float | None]:
        """``points`` rates around the middle, a factor apart."""
        if self.middle is None:
            return [None]
        return [three_digits(self.middle * factor ** (k - points // 2)) for k in range(points)]


@dataclass(frozen=True)
class Config:
    """A method with everything chosen."""

    method: Method
    setting: str
    rate: float | None


@dataclass(frozen=True)
class Task:
    """One training.

    Attributes:
        words: its flags, all but those of the folder.
    """

    cell: Cell
    config: Config
    seed: int
    words: tuple[str, ...] = field(compare=False)

    @property
    def key(self) -> str:
        """Its name in the file of finished trainings."""
        rate = "auto" if self.config.rate is None else f"{self.config.rate:.3g}"
        return f"{self.cell} | {self.config.method.entry_with(self.config.setting)} | {rate} | seed {self.seed}"


def three_digits(rate: float) -> float:
    """As trainings are named by it."""
    return float(f"{rate:.3g}")


class Bench:
    """Makes trainings, or finds them made.

    Args:
        training: flags that all of them share.
        subjects: the flags of each.
        file: rows of finished trainings; a kill loses no more than those that are under way.
        workers: processes of one thread; 1: this process.
        train: makes one; its row.
    """

    def __init__(
        self,
        training: Sequence[str],
        subjects: Mapping[str, Sequence[str]],
        file: Path,
        workers: int = 1,
        train: Callable[[Task], Row] | None = None,
    ) -> None:
        self.training = (*training, *MEASURED)
        self._subjects = subjects
        self._file = file
        self._workers = workers
        self._train = train or make_training
        self._words: dict[str, tuple[str, ...]] = {}
        self.rows = {row["key"]: row for row in read_jsonl(file, OBJECT)}
        self.asked: set[Task] = set()

    def task(self, cell: Cell, config: Config, seed: int) -> Task:
        """A training; its flags were checked by ``usable``."""
        rate = "auto" if config.rate is None else f"{config.rate:g}"
        own = ["--learning_rate", rate, "--seed", str(seed), *cell.words, *self._subjects[cell.subject]]
        words = self._method_words(config.method.entry_with(config.setting))
        return Task(cell, config, seed, (*self.training, *words, *own))

    def run(self, tasks: Iterable[Task], what: str) -> dict[Task, Row]:
        """The rows of all these, made where they are missing."""
        tasks = list(dict.fromkeys(tasks))
        self.asked |= set(tasks)
        missing = [task for task in tasks if task.key not in self.rows]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        done = self._made(missing)
        for task, row in tqdm(done, desc=what, total=len(tasks), initial=len(tasks) - len(missing), unit="run"):
            self.rows[task.key] = {"key": task.key, **row}
            append_jsonl(self._file, [self.rows[task.key]])
        return {task: self.rows[task.key] for task in tasks}

    def usable(self, methods: Iterable[Method]) -> list[Method]:
        """Those that this version and machine have; a word about the others."""
        found = []
        for method in methods:
            try:
                self._check(method)
                found.append(method)
            except UserError as error:
                print(f"left out: {method.label}: {str(error).splitlines()[0]}")
        return found

    def _check(self, method: Method) -> None:
        from dreamlora import registry
        from dreamlora.cli.parse import parse_run

        rate = "auto" if method.middle is None else f"{method.middle:g}"
        for setting in method.settings:
            words = self._method_words(method.entry_with(setting))
            config, _ = parse_run([*self.training, *words, "--learning_rate", rate], PROGRAMS[PROGRAM])
        needs = getattr(registry.load("optimizers", config.optim.optimizer), "NEEDS", None)
        if needs:
            registry.check_installed(*needs)

    def _method_words(self, entry: str) -> tuple[str, ...]:
        from dreamlora.sweep.plan import parse_entry

        if entry not in self._words:
            self._words[entry] = parse_entry(entry, self.training, PROGRAMS[PROGRAM]).words
        return self._words[entry]

    def _made(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Row]]:
        if self._workers == 1:
            for task in tasks:
                yield task, self._train(task)
            return
        for batch in (tasks[at : at + MOST_PER_POOL] for at in range(0, len(tasks), MOST_PER_POOL)):
            yield from self._made_by_others(batch)

    def _made_by_others(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Row]]:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, mp_context=spawn, initializer=_begin_worker) as pool:
            futures = {pool.submit(self._train, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # leaving the pool would make all the others first
                raise


def make_training(task: Task) -> Row:
    """Train in a scratch folder, without a word.

    Returns:
        base, final: eval/loss at both ends; ``final`` is None if the training broke off at a value that is not finite.
        images: ``[base, final]`` of every measured image; none if it broke off.
        step_s: seconds of a step, without what callbacks do: of the processor, or on a GPU by the clock.
        other_s: seconds of all else.
        rate: the learning rate that it had.
    """
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        row = _trained(task, Path(scratch) / "run")
    gc.collect()
    gc.freeze()  # else every collection looks through the million objects of the libraries: half a second
    return row


def _trained(task: Task, folder: Path) -> Row:
    from dreamlora.cli.parse import parse_run
    from dreamlora.metric_names import EVAL_LOSS
    from dreamlora.run import assemble
    from dreamlora.training import loop

    started = _now()
    run = assemble.prepare(*parse_run([*task.words, "--output_dir", str(folder)]))
    clock = StepClock(run.callbacks)
    try:
        loop.train(run)
    except DivergedError:
        pass
    finally:
        run.folder.release()
    values = {row["step"]: row["value"] for row in run.folder.metrics() if row["name"] == EVAL_LOSS}
    final = values.get(task.cell.steps)
    return {
        "base": values[0],
        "final": final,
        "images": [] if final is None else _by_image(run.folder.eval_items_file, task.cell.steps),
        "step_s": clock.mean(),
        "other_s": _now() - started - sum(clock.seconds),
        "rate": float(run.optimizer.param_groups[0]["initial_lr"]),
    }


def loss(row: Row) -> float:
    """At the end; infinite if there is none."""
    return math.inf if row["final"] is None else float(row["final"])


def gain(row: Row) -> float:
    """By how much the loss fell."""
    return float(row["base"]) - loss(row)


class StepClock:
    """Seconds of steps, without what callbacks do between them; it takes the first and the last place among them."""

    def __init__(self, callbacks: list[Any]) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0
        callbacks.insert(0, _Stop(self))
        callbacks.append(_Start(self))

    def mean(self) -> float:
        """Of all but the first steps, if there are more."""
        timed = self.seconds[UNTIMED:] or self.seconds
        return sum(timed) / len(timed) if timed else 0.0


class _Stop:
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_start(self, run: Any) -> None: ...

    def on_step(self, run: Any, result: Any) -> None:
        self._clock.seconds.append(_now() - self._clock.begun)

    def on_end(self, run: Any) -> None: ...


class _Start:
    def __init__(self, clock: StepClock) -> None:
        self._clock = clock

    def on_start(self, run: Any) -> None:
        self._clock.begun = _now()

    def on_step(self, run: Any, result: Any) -> None:
        self._clock.begun = _now()

    def on_end(self, run: Any) -> None: ...


def _now() -> float:
    """A processor's time does not contain what else the machine does; the loop waits for a GPU in every step."""
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _by_image(file: Path, step: int) -> list[list[float]]:
    from dreamlora.eval_loss.items import ItemLosses

    losses = ItemLosses.load(file)
    return [
        [round(float(losses.rows[when][losses.image == image].mean(dtype=float)), 7) for when in (0, step)]
        for image in sorted(set(losses.image.tolist()))
    ]


def _begin_worker() -> None:
    """One thread; and whoever kills the program that started this process means the trainings too."""
    import torch

    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
