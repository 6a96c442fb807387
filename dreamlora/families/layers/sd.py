"""Names of Stable Diffusion 1 and 2: kohya's trainer has diffusers' UNet for them.

Source: kohya's sd-scripts, ``networks/lora.py`` (``LORA_PREFIX_UNET``, ``LORA_PREFIX_TEXT_ENCODER``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamlora.families.layers import _unet
from dreamlora.lora.names import LayerNames, ModelNames

_UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")}

_WIDTH_OF_SECOND = 1024
"""Of version 2's text encoder."""


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    second = config.get("cross_attention_dim") == _WIDTH_OF_SECOND
    return ModelNames(
        denoiser="unet",
        layers=LayerNames(_unet.layers(_UP | dict(config))),
        text_encoders={"text_encoder": "te"},
        kohya="diffusers",
        one_alpha=True,
        architecture="stable-diffusion-v2-512" if second else "stable-diffusion-v1",
        implementation="https://github.com/CompVis/stable-diffusion",
        base_version="sd_v2" if second else "sd_v1",
    )
