"""Names of FLUX.1 and Kontext.

Source: diffusers' ``loaders.single_file_utils.convert_flux_transformer_checkpoint_to_diffusers`` and
``loaders.lora_conversion_utils._convert_kohya_flux_lora_to_diffusers``, ComfyUI's ``utils.flux_to_diffusers``, and
kohya's sd-scripts, ``networks/lora_flux.py`` (``LORA_PREFIX_FLUX``, ``LORA_PREFIX_TEXT_ENCODER_CLIP``), whose
``split_qkv`` writes ranks of q, k and v apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.families.layers import _flux
from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed

_EMBEDDERS = {
    "time_text_embed.timestep_embedder": "time_in",
    "time_text_embed.text_embedder": "vector_in",
    "time_text_embed.guidance_embedder": "guidance_in",
}


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers()),
        text_encoders={"text_encoder": "te1"},
        architecture="flux-1-dev" if config.get("guidance_embeds", True) else "flux-1-schnell",
        implementation="https://github.com/black-forest-labs/flux",
        base_version="flux1",
    )


def _layers() -> Iterator[Original]:
    yield from _flux.double_blocks("net.0.proj", "net.2")
    yield from _flux.single_blocks()
    yield from _flux.modulations()
    yield from _flux.embedders(_EMBEDDERS)
    yield from renamed(_flux.ENDS)
    yield _flux.NORM_OUT
