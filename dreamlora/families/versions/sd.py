"""Sizes of Stable Diffusion 1 and 2: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Stable Diffusion 1",
        inputs=(4, 320, 640, 768, 960, 1280, 1920, 2560, 5120),
        blocks={"transformer_blocks": 1},
        layers=282,
        text_widths=(768,),
    ),
    Version(
        name="Stable Diffusion 2",
        inputs=(4, 320, 640, 960, 1024, 1280, 1920, 2560, 5120),
        blocks={"transformer_blocks": 1},
        layers=282,
        text_widths=(1024,),
    ),
)
