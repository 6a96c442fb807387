"""Sizes of Stable Diffusion XL: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Stable Diffusion XL",
        inputs=(4, 320, 640, 960, 1280, 1920, 2048, 2560, 2816, 5120),
        blocks={"transformer_blocks": 10},
        layers=794,
        text_widths=(768, 1280),
    ),
)
