"""Sizes of Z-Image: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Z-Image",
        inputs=(64, 256, 1024, 2560, 3840, 10240),
        blocks={"layers": 30},
        layers=276,
    ),
)
