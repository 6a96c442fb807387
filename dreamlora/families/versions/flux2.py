"""Sizes of FLUX.2: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="FLUX.2 dev",
        inputs=(128, 256, 6144, 15360, 18432, 24576),
        blocks={"transformer_blocks": 8, "single_transformer_blocks": 48},
        layers=203,
    ),
    Version(
        name="FLUX.2 klein 4B",
        inputs=(128, 256, 3072, 7680, 9216, 12288),
        blocks={"transformer_blocks": 5, "single_transformer_blocks": 20},
        layers=111,
    ),
    Version(
        name="FLUX.2 klein 9B",
        inputs=(128, 256, 4096, 12288, 16384),
        blocks={"transformer_blocks": 8, "single_transformer_blocks": 24},
        layers=155,
    ),
)
