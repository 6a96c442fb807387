"""Names of Stable Diffusion XL: kohya's trainer has Stability's own UNet for it.

Source: kohya's sd-scripts, ``networks/lora.py`` (``LORA_PREFIX_TEXT_ENCODER1``, ``LORA_PREFIX_TEXT_ENCODER2``), and
``library/sdxl_original_unet.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamlora.families.layers import _unet
from dreamlora.lora.names import LayerNames, ModelNames

_UP = {
    "block_out_channels": (320, 640, 1280),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="unet",
        layers=LayerNames(_unet.layers(_UP | dict(config))),
        text_encoders={"text_encoder": "te1", "text_encoder_2": "te2"},
        one_alpha=True,
        architecture="stable-diffusion-xl-v1-base",
        implementation="https://github.com/Stability-AI/generative-models",
        base_version="sdxl_base_v1-0",
    )
