"""Names of FLUX.2, dev and klein: all blocks share their modulations, and a block of one stream has fused layers in
diffusers too.

Source: diffusers' ``loaders.single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers`` and
``loaders.lora_conversion_utils`` (``_convert_kohya_flux2_lora_to_diffusers``,
``_convert_non_diffusers_flux2_lora_to_diffusers``), and musubi-tuner's ``networks/lora_flux_2.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.families.layers import _flux
from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed

_EMBEDDERS = {
    "time_guidance_embed.timestep_embedder": "time_in",
    "time_guidance_embed.guidance_embedder": "guidance_in",
}
_MODULATIONS = {
    f"{name}.linear": f"{name}.lin"
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
}

_ARCHITECTURES = {20: "Flux.2-klein-4b", 24: "Flux.2-klein-9b", 48: "Flux.2-dev"}
"""musubi-tuner's names of the models (``utils/sai_model_spec.py``), by their blocks of one stream."""


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers()),
        architecture=_ARCHITECTURES.get(config.get("num_single_layers", 0), "Flux.2"),
        implementation="https://github.com/black-forest-labs/flux2",
        base_version="flux2",
    )


def _layers() -> Iterator[Original]:
    yield from _flux.double_blocks("linear_in", "linear_out")
    yield from _flux.fused_single_blocks()
    yield from _flux.embedders(_EMBEDDERS)
    yield from renamed(_MODULATIONS | _flux.ENDS)
    yield _flux.NORM_OUT
