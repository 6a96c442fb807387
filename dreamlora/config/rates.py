"""Learning rates that nobody gave, and the units that they are in. No torch here."""

from __future__ import annotations

from dreamlora import registry
from dreamlora.config.run import AUTO, Optim, RunConfig
from dreamlora.errors import UserError


def in_start_units(optim: Optim) -> bool:
    """Whether the learning rate is in units of the start; some methods have such by themselves (``UNITS_FREE``)."""
    free = getattr(registry.load("optimizers", optim.optimizer), "UNITS_FREE", False)
    return optim.lora_units == "start" and not free


def finds_rate(optimizer: str) -> bool:
    """Whether it finds its rate as it trains, so that a learning rate is a factor on that. Unknown ones do not."""
    known = optimizer in registry.names("optimizers")
    return known and getattr(registry.load("optimizers", optimizer), "FINDS_RATE", False)


def told_rate(optimizer: str, rate: str) -> str:
    """A learning rate as it is told of a run with this optimizer."""
    return f"{rate} × what it finds" if finds_rate(optimizer) else rate


def own_rate(optim: Optim) -> float | None:
    """The optimizer's own learning rate in the units that were chosen; None: it names none in units of the start."""
    method = registry.load("optimizers", optim.optimizer)
    rate: float | None = getattr(method, "START_LR", None) if in_start_units(optim) else method.DEFAULT_LR
    return rate


def default_rate(config: RunConfig) -> float:
    """The learning rate of a run that was given none, or ``auto``: what a file or the preset says, else the optimizer.

    Raises:
        UserError: the optimizer names none in the units that were chosen.
    """
    optim = config.optim
    said = (source.get("learning_rate", AUTO) for source in config.sources)
    rate = next((rate for rate in said if rate != AUTO), None)
    rate = own_rate(optim) if rate is None else rate
    if rate is None:
        raise UserError(
            f"--lora_units start: --optimizer {optim.optimizer} names no learning rate in these units (START_LR): give "
            "--learning_rate"
        )
    return rate


def rate_outside_pairs(optim: Optim, rate: float) -> float:
    """``rate`` for what is in no pair, and so in plain units: as much smaller as the optimizer's own is there."""
    method = registry.load("optimizers", optim.optimizer)
    own: float = method.DEFAULT_LR
    return rate * own / getattr(method, "START_LR", own) if in_start_units(optim) else rate
