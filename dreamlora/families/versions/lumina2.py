"""Sizes of Lumina Image 2.0: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Lumina Image 2.0",
        inputs=(64, 256, 1024, 2304, 9216),
        blocks={"layers": 26},
        layers=244,
    ),
)
