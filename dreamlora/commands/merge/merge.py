"""LoRAs into a base model, or into one LoRA."""

from __future__ import annotations

from typing import Any

from dreamlora.commands.merge.flags import MergeConfig
from dreamlora.commands.merge.into_model import merge_into_model
from dreamlora.commands.merge.together import merge_together


def merge(config: MergeConfig) -> dict[str, Any]:
    """Write what is merged; what it is made of, as JSON can say it.

    Raises:
        UserError: something cannot be read, does not fit, cannot be written so, or lies in the place of the output.
        WriteError: the system refused.
    """
    return merge_together(config) if config.pretrained_model_name_or_path is None else merge_into_model(config)
