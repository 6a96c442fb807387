"""Sizes of Stable Diffusion 3 and 3.5: see ``families.versions``."""

from __future__ import annotations

from dreamlora.lora.recognise import Version

VERSIONS = (
    Version(
        name="Stable Diffusion 3 medium",
        inputs=(16, 256, 1536, 2048, 4096, 6144),
        blocks={"transformer_blocks": 24},
        layers=341,
        text_widths=(768, 1280),
        lacks=("attn2",),
    ),
    Version(
        name="Stable Diffusion 3.5 medium",
        inputs=(16, 256, 1536, 2048, 4096, 6144),
        blocks={"transformer_blocks": 24},
        layers=393,
        text_widths=(768, 1280),
    ),
    Version(
        name="Stable Diffusion 3.5 large",
        inputs=(16, 256, 2048, 2432, 4096, 9728),
        blocks={"transformer_blocks": 38},
        layers=537,
        text_widths=(768, 1280),
        lacks=("attn2",),
    ),
)
