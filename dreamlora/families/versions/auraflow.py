"""Sizes of AuraFlow: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="AuraFlow",
        inputs=(16, 256, 2048, 3072, 8192),
        blocks={"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
        layers=326,
    ),
)
