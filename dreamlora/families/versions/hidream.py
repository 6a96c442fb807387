"""Sizes of HiDream-I1: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="HiDream-I1",
        inputs=(64, 256, 2048, 2560, 3584, 4096, 6912),
        blocks={"double_stream_blocks": 16, "single_stream_blocks": 32},
        layers=1128,
    ),
)
