"""Sizes of Sana: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Sana 1.6B",
        inputs=(1, 32, 256, 2240, 2304, 5600),
        blocks={"transformer_blocks": 20},
        layers=227,
    ),
    Version(
        name="Sana 0.6B",
        inputs=(1, 32, 256, 1152, 2304, 2880),
        blocks={"transformer_blocks": 28},
        layers=315,
    ),
)
