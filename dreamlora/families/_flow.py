"""The objective of rectified flows: what a scheduler's config and the options say of times, shift and loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from dreamlora.config.times import sampling_of
from dreamlora.errors import UserError
from dreamlora.objectives import RectifiedFlow, densities, training_loss
from dreamlora.objectives.densities import Density
from dreamlora.objectives.flow import Shift

OWN_OPTIONS: tuple[str, ...] = (
    *("weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
    *("timestep_sampling", "sigmoid_scale", "timestep_beta", "timestep_table", "timestep_shift"),
    "precondition_outputs",
)
"""Options of this objective, for ``Family.OWN_OPTIONS``."""
LARGEST_SHIFT = 100
"""That a scheduler's config can mean; the largest known ones are 7 to 8."""
OF_DIFFUSION = ("prediction_type", "snr_gamma", "debiased_estimation_loss", "rescale_betas_zero_snr")


def objective(
    scheduler: Any,
    train: Any,
    *,
    shift: str | float = "none",
    patch: int = 2,
    mu: Callable[[int], float] | None = None,
    density: Density | None = None,
) -> RectifiedFlow:
    """Rectified flow over a scheduler's training sigmas; for ``Family.objective``.

    Args:
        scheduler: of the pipeline; its config counts, not what it has been set to.
        train: ``config.Train``.
        shift: the family's own for ``--timestep_shift``: "none", "scheduler" (what the scheduler's config says, for
            dynamic shifting by the number of image tokens), or a factor.
        patch: side of the square of latents that an image token stands for.
        mu: of the number of image tokens, for schedulers with dynamic shifting whose pipeline computes it otherwise
            than by the straight line of the scheduler's config.
        density: the family's own, unless ``--timestep_sampling`` or ``--weighting_scheme`` names one; None: uniform.

    Raises:
        UserError: options of diffusion models are given, or the scheduler's config has no usable shift.
    """
    for option in OF_DIFFUSION:
        if getattr(train, option):
            raise UserError(
                f"--{option} is for diffusion models; this one is a rectified flow (see --weighting_scheme and "
                "--timestep_shift)"
            )
    fresh = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    grid = FlowMatchEulerDiscreteScheduler(num_train_timesteps=fresh.config.num_train_timesteps).sigmas
    asked = shift if train.timestep_shift is None else train.timestep_shift
    return RectifiedFlow(
        sigmas=grid,
        density=_density(train, density or densities.Uniform()),
        shift=_shift(fresh.config, asked, patch, mu),
        weighting=train.weighting_scheme if train.weighting_scheme in ("sigma_sqrt", "cosmap") else "none",
        preconditioned=bool(train.precondition_outputs),
        loss=training_loss(train),
    )


def _density(train: Any, own: Density) -> Density:
    """The density that is asked for, else the family's."""
    named = sampling_of(train)
    if named is None:
        return own
    made: dict[str, Callable[[], Density]] = {
        "uniform": densities.Uniform,
        "logit_normal": lambda: densities.LogitNormal(train.logit_mean, train.logit_std),
        "mode": lambda: densities.Mode(train.mode_scale),
        "sigmoid": lambda: densities.LogitNormal(0.0, train.sigmoid_scale),
        "beta": lambda: densities.beta(*train.timestep_beta),
        "table": lambda: densities.table([float(share) for share in train.timestep_table]),
    }
    return made[named]()


def _shift(config: Any, asked: str | float, patch: int, mu: Callable[[int], float] | None) -> Shift:
    if asked == "none":
        return Shift()
    if asked != "scheduler":
        return Shift(_constant(float(asked)))
    terminal = config.shift_terminal or None
    if terminal is not None:
        _require(config, 1, "shift_terminal")
    if not config.use_dynamic_shifting:
        _require(config, LARGEST_SHIFT, "shift")
        return Shift(_constant(config.shift), terminal)
    line = mu or _line(config)
    if config.time_shift_type == "linear":
        return Shift(lambda sides: line(_tokens(sides, patch)), terminal)
    return Shift(lambda sides: math.exp(line(_tokens(sides, patch))), terminal)


def _constant(factor: float) -> Callable[[tuple[int, int]], float]:
    return lambda sides: factor


def _line(config: Any) -> Callable[[int], float]:
    """``mu`` as diffusers' ``calculate_shift``: straight from the base to the largest number of tokens."""
    _require(config, LARGEST_SHIFT, "base_shift", "max_shift")
    _require(config, math.inf, "base_image_seq_len", "max_image_seq_len")
    low, high = config.base_image_seq_len, config.max_image_seq_len
    if not low < high:
        raise UserError(
            f"the model's scheduler_config.json says base_image_seq_len {low} and max_image_seq_len {high}, where the "
            f"second must be larger: {_WAY_OUT}"
        )
    slope = (config.max_shift - config.base_shift) / (high - low)
    return lambda tokens: config.base_shift + slope * (tokens - low)


def _tokens(sides: tuple[int, int], patch: int) -> int:
    return (sides[0] // patch) * (sides[1] // patch)


def _require(config: Any, below: float, *names: str) -> None:
    for name in names:
        value = config[name]
        if not (isinstance(value, int | float) and 0 < value < below):
            raise UserError(
                f"the model's scheduler_config.json says {name}: {value}, where a number above 0 "
                f"{f'and below {below} ' if below < math.inf else ''}is expected: {_WAY_OUT}"
            )


_WAY_OUT = "give --timestep_shift none, or a number"
