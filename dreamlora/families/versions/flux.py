"""Sizes of FLUX.1: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="FLUX.1",
        inputs=(64, 256, 768, 3072, 4096, 12288, 15360),
        blocks={"transformer_blocks": 19, "single_transformer_blocks": 38},
        layers=504,
        text_widths=(768,),
    ),
)
