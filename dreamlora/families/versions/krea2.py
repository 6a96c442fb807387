"""Sizes of Krea 2: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Krea 2",
        inputs=(12, 64, 256, 2560, 6144, 6912, 16384),
        blocks={"transformer_blocks": 28},
        layers=264,
    ),
)
