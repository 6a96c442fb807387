"""What can be set of a run: every option once. ``run`` has the groups and the whole, ``programs`` the programs."""

from dreamlora.config.data import OWN_IMAGES, Data, DataSet, instance_prompt_of
from dreamlora.config.measuring import IMAGES_FOR_METRICS, Encoders, Eval, Sample
from dreamlora.config.model import EMBEDDED_MODEL, Model, Precision
from dreamlora.config.new_tokens import NewTokens
from dreamlora.config.programs import PROGRAMS, TextToImageConfig, program_of
from dreamlora.config.run import (
    Lora,
    Optim,
    RunConfig,
    Scheduler,
    Tracker,
    Train,
    as_flat_dict,
)

__all__ = [
    "EMBEDDED_MODEL",
    "IMAGES_FOR_METRICS",
    "OWN_IMAGES",
    "PROGRAMS",
    "Data",
    "DataSet",
    "Encoders",
    "Eval",
    "Lora",
    "Model",
    "NewTokens",
    "Optim",
    "Precision",
    "RunConfig",
    "Sample",
    "Scheduler",
    "TextToImageConfig",
    "Tracker",
    "Train",
    "as_flat_dict",
    "instance_prompt_of",
    "program_of",
]
