"""Sizes of Qwen-Image, and Qwen-Image-Edit: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Qwen-Image",
        inputs=(64, 256, 3072, 3584, 12288),
        blocks={"transformer_blocks": 60},
        layers=846,
    ),
)
