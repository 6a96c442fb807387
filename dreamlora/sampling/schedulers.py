"""Schedulers that draw no noise while they denoise."""

from __future__ import annotations

from typing import Any

NOISY = {
    "DDPMScheduler": "DDIMScheduler",
    "DDPMParallelScheduler": "DDIMScheduler",
    "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "KDPM2DiscreteScheduler",
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler",
    "SASolverScheduler": "UniPCMultistepScheduler",
}
"""Schedulers that add noise at every step, and the deterministic ones of the same noise levels in their place."""


def deterministic(scheduler: Any) -> tuple[Any, str | None]:
    """A fresh copy of the scheduler that adds no noise, and a note if it had to be another one.

    Samples of different steps and optimizers are compared image by image, so they must differ by the weights alone.
    Few-step distilled schedulers (LCM, TCD) cannot do without noise and are kept: they draw it from the images' own
    generators.
    """
    kind: Any = type(scheduler)
    config = dict(scheduler.config)
    changes: dict[str, Any] = {}
    if kind.__name__ in NOISY:
        import diffusers

        kind = getattr(diffusers, NOISY[kind.__name__])
    if str(config.get("algorithm_type", "")).startswith("sde-"):
        changes["algorithm_type"] = config["algorithm_type"].removeprefix("sde-")
    if config.get("stochastic_sampling"):
        changes["stochastic_sampling"] = False
    copy = kind.from_config({**config, **changes})
    if kind is type(scheduler) and not changes:
        return copy, None
    how = " ".join([kind.__name__, *(f"{name}={value}" for name, value in changes.items())])
    return copy, f"samples are drawn with {how}: {type(scheduler).__name__} adds noise at every step"
