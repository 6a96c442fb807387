"""``--learning_rate auto``: a range test finds the rate before the first step, and leaves everything as it was.

Each short run has an optimizer, a schedule and a gradient scaler of its own, and begins with the LoRA as it stands; all
random draws are functions of the seed and the place in the run. So the run that follows is, bit for bit, the one that
is given the proposed rate.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer

from dreamlora.callbacks.evaluate import measure
from dreamlora.errors import DivergedError
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.eval_loss.rates import ITEMS, USUAL, RangeTest, next_power, steps_of
from dreamlora.figures import loss, rate
from dreamlora.files import write_atomically
from dreamlora.interrupts import Interrupted
from dreamlora.processes import tell_everyone
from dreamlora.run import defaults
from dreamlora.run.context import RunContext
from dreamlora.run.trainable import bare_optimizer_of, optimizer_of
from dreamlora.training import loop
from dreamlora.training.loop import Run


def settle(context: RunContext, run: Run, items: EvalSet, metric: str, options: Any) -> None:
    """Find the learning rate of a run that stands before its first step, and give it to the run.

    Args:
        context: whose ``open_rates`` say which options get it, and are none afterwards. Until then they have the rate
            of a run without a test.
        run: with the LoRA as it starts. Its optimizer and its schedule are made anew.
        items: of the evaluation, of which some are measured.
        metric: what that is called.
        options: of the optimizer.
    """
    assert context.eval_price is not None
    training, started = context.eval_price.training, time.perf_counter()
    items = items.subset(ITEMS, context.config.eval.eval_seed, "range test")
    per_step, measured = training / run.total_steps, len(items.times)
    steps = steps_of(per_step, run.total_steps, measured)

    def share(runs: int) -> float:
        return (runs * (steps * per_step + measured) + measured) / training

    context.tell(
        f"--learning_rate auto: a test finds it, by some {USUAL} runs of {steps} steps and {metric} on {measured} "
        f"items after each: {share(USUAL):.1%} of what the training costs"
    )
    with context.timed("learning rate test"), _untouched(run), _told_before():
        tested = _tested(context, run, items, options, steps)
    cost = {"share": round(share(len(tested.items)), 4), "seconds": round(time.perf_counter() - started, 2)}
    found = tell_everyone({**tested.facts(metric, items.id), **cost})
    context.config = run.config = defaults.with_rate(context.config, context.open_rates, found["learning_rate"])
    context.open_rates = ()
    with _told_before():
        run.optimizer, run.lr_scheduler = optimizer_of(context, context.accelerator.unwrap_model(run.model), options)
    if context.accelerator.is_main_process:
        write_atomically(run.folder.range_test_file, json.dumps(found, indent=1))
    context.tell(f"{found['reason']} The test took {found['seconds']:.0f} s")


def _tested(context: RunContext, run: Run, items: EvalSet, options: Any, steps: int) -> RangeTest:
    """All short runs, the next where those before it point to."""
    own: Any = context.config.optim.learning_rate
    by_power: dict[int, np.ndarray | None] = {}
    tested = RangeTest(own, steps, _whole_steps(run), _measured(run, items), by_power)
    while (power := next_power(tested.losses)) is not None:
        tried = copy.copy(context)
        tried.config = defaults.with_rate(context.config, context.open_rates, tested.rate(power))
        by_power[power] = _short_run(tried, run, items, options, steps)
        found = tested.losses[power]
        context.tell(f"  {rate(tested.rate(power))}: {'diverged' if by_power[power] is None else loss(found)}")
    return tested


def _short_run(context: RunContext, run: Run, items: EvalSet, options: Any, steps: int) -> np.ndarray | None:
    """``[items]`` losses after so many steps at the rate that ``context`` has, without schedule and moving average;
    None: it diverged. The LoRA is as before.
    """
    accelerator = run.accelerator
    optim = replace(context.config.optim, lr_scheduler="constant")
    context.config = replace(context.config, optim=optim)
    scaler = accelerator.scaler
    start = {name: parameter.detach().clone() for name, parameter in run.trainables.items()}
    try:
        accelerator.scaler = copy.deepcopy(scaler)
        optimizer, schedule = bare_optimizer_of(context, accelerator.unwrap_model(run.model), options)
        prepared = AcceleratedOptimizer(optimizer, scaler=accelerator.scaler)
        alone = replace(run, optimizer=prepared, lr_scheduler=schedule, average=None, config=context.config)
        return _losses_after(alone, items, steps)
    except DivergedError:
        return None
    finally:
        accelerator.scaler = scaler
        for name, parameter in run.trainables.items():
            parameter.data.copy_(start[name])
            parameter.grad = None


def _losses_after(run: Run, items: EvalSet, steps: int) -> np.ndarray | None:
    """Those that fp16 skips are no steps."""
    batches = loop.next_batches(run, run.step, 0)
    while run.lr_scheduler.last_epoch < steps:
        run.to_training()
        _, batches = loop.optimizer_step(run, batches)
        run.to_looking()
        if run.stopping:
            raise Interrupted(run.stopping)
    losses = _measured(run, items)
    return losses if np.isfinite(losses).all() else None


def _measured(run: Run, items: EvalSet) -> np.ndarray:
    return np.array(measure(run, items), dtype=np.float32)


def _whole_steps(run: Run) -> float:
    """Steps of the run, as if each had the highest rate of its schedule."""
    factor = run.lr_scheduler.lr_lambdas[0]
    return float(sum(factor(step) for step in range(run.total_steps)))


@contextlib.contextmanager
def _told_before() -> Iterator[None]:
    """What optimizers warn of when they are made was told of the first one."""
    logger = logging.getLogger("dreamlora.optimizers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _untouched(run: Run) -> Iterator[None]:
    """What is drawn and timed in here leaves no trace."""
    device, seconds = run.accelerator.device, run.eval_seconds
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            run.eval_seconds = seconds
