"""What a run says of its model's schedule, in place of what the scheduler's config says."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import EulerDiscreteScheduler

from dreamlora.interfaces import ModelSource
from dreamlora.reading import tell_once


def as_trained(scheduler: Any, source: ModelSource) -> Any:
    """The scheduler with the prediction type of a source, and with zero terminal SNR (arXiv 2305.08891) if it has that.

    Samples then begin at pure noise, where training has been too: "trailing", as the paper has it and diffusers says.
    Schedulers that cannot be rescaled, such as PNDM, give way to Euler's.
    """
    kind: Any = type(scheduler)
    changes: dict[str, Any] = {}
    if source.prediction_type:
        changes["prediction_type"] = source.prediction_type
    if source.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
            kind = EulerDiscreteScheduler
            tell_once(
                f"samples are drawn with {kind.__name__}: {type(scheduler).__name__} knows no zero terminal SNR "
                "(--rescale_betas_zero_snr)"
            )
    # one that is only registered would be lost in the next copy, if the config did not say it before
    return kind.from_config(scheduler.config, **changes) if changes else scheduler
