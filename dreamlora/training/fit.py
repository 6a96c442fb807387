"""Whether a state that was read is one of this very run: names, shapes and numbers, before any of it is taken over.

What of it belongs to the optimizer is also its own to check (``optimizers._states``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dreamlora import registry
from dreamlora.lora.pairs import adapted_layers
from dreamlora.training.loop import MAX_SKIPPED_STEPS, Run

_CONSTANT = ("betas", "eps", "weight_decay", "momentum", "initial_lr")
"""Settings of groups that no optimizer changes as it goes."""
_ROUNDING = 1 + 1e-6


def misfit(run: Run, saved: Mapping[str, Any]) -> str | None:
    """What keeps a run from going on from a state, in words; None if nothing does.

    Args:
        run: as it is before its first step.
        saved: as ``state_file.read_state`` gives it.
    """
    return next(_misfits(run, saved), None)


def _misfits(run: Run, saved: Mapping[str, Any]) -> Iterator[str]:
    yield from _of_tensors("the LoRA", run.trainables, saved["trainables"])
    averaged = run.trainables if run.average else {}
    yield from _of_tensors("what the average is of", averaged, saved.get("averaged", {}))
    yield from _of_starts(run, saved["starts"])
    step, done = saved["step"], saved["lr_scheduler"]["last_epoch"]
    scaled = run.accelerator.scaler is not None
    if done > step or (done < step and not scaled):  # only fp16 skips steps
        yield f"its schedule stands at step {done}, and it has made {step}"
    if saved.get("skipped_steps", 0) > (MAX_SKIPPED_STEPS if scaled else 0):
        yield f"it has skipped {saved['skipped_steps']} steps in a row, which no run does"
    if list(saved["lr_scheduler"]["base_lrs"]) != list(run.lr_scheduler.base_lrs):
        yield f"its learning rates are {saved['lr_scheduler']['base_lrs']}, and not {run.lr_scheduler.base_lrs}"
    for now, group in zip(run.optimizer.param_groups, saved["optimizer"]["param_groups"], strict=False):
        yield from _of_settings(now, group)


def _of_tensors(what: str, now: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> Iterator[str]:
    apart = sorted(now.keys() ^ saved.keys())
    if apart:
        yield f"{what} has {len(now)} tensors there and {len(saved)} in the state; {apart[0]} is in one of them alone"
    for name, tensor in now.items():
        wanted, found = ((each.dtype, tuple(each.shape)) for each in (tensor, saved[name]))
        if wanted != found:
            yield f"{name} of {what} is {found[1]} of {found[0]}, and not {wanted[1]} of {wanted[0]}"


def _of_starts(run: Run, saved: Mapping[str, Mapping[str, Tensor]]) -> Iterator[str]:
    wanted: dict[str, Tensor] = {}
    if registry.load("inits", run.config.lora.init).OFFSET:
        for layer in adapted_layers(run.accelerator.unwrap_model(run.model)):
            wanted |= {f"{layer.name}.A": layer.A.detach(), f"{layer.name}.B": layer.B.detach()}
    found = {f"{name}.{factor}": tensor for name, start in saved.items() for factor, tensor in start.items()}
    yield from _of_tensors("the start", wanted, found)


def _of_settings(now: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
    for name in _CONSTANT:
        if name in now and name in saved and _plain(saved[name]) != _plain(now[name]):
            yield f"{name} of its optimizer is {saved[name]}, and not {now[name]}"
    highest = now.get("initial_lr", now["lr"])
    rate = saved.get("lr", highest)
    if not isinstance(rate, int | float) or not 0 <= rate <= highest * _ROUNDING:
        yield f"the learning rate of its optimizer is {rate}, and at most {highest} can be meant"


def _plain(value: Any) -> Any:
    """The same for tuples and lists."""
    return list(value) if isinstance(value, tuple | list) else value
