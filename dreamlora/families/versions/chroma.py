"""Sizes of Chroma: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Chroma",
        inputs=(64, 3072, 4096, 5120, 12288, 15360),
        blocks={"transformer_blocks": 19, "single_transformer_blocks": 38},
        layers=433,
    ),
)
