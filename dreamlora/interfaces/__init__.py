"""What the parts exchange: records, and the contracts that plug-ins fulfil."""

from dreamlora.interfaces.family import (
    PICTURE,
    Classes,
    Components,
    Family,
    Latents,
    LatentSize,
    ModelSource,
    Role,
    SampleDefaults,
    Settings,
    View,
)
from dreamlora.interfaces.measuring import Encoder, EncoderRole, ImageMetric, MetricInputs, Need, Reading
from dreamlora.interfaces.training import Batch, Callback, Conditioning, Objective, StepResult

__all__ = [
    "PICTURE",
    "Batch",
    "Callback",
    "Classes",
    "Components",
    "Conditioning",
    "Encoder",
    "EncoderRole",
    "Family",
    "ImageMetric",
    "LatentSize",
    "Latents",
    "MetricInputs",
    "ModelSource",
    "Need",
    "Objective",
    "Reading",
    "Role",
    "SampleDefaults",
    "Settings",
    "StepResult",
    "View",
]
