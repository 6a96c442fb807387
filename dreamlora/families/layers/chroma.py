"""Names of Chroma: FLUX.1's without its modulations, which one small network gives instead.

Source: diffusers' ``loaders.single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers``, and kohya's
sd-scripts, ``library/chroma_models.py`` with ``networks/lora_flux.py``. ComfyUI's Chroma is one of its FLUX models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.families.layers import _flux
from dreamlora.lora.names import LayerNames, ModelNames, Original, renamed, same

_GUIDANCE = "distilled_guidance_layer."


def names(config: Mapping[str, Any]) -> ModelNames:
    """See ``families.layers``."""
    return ModelNames(
        denoiser="transformer",
        layers=LayerNames(_layers()),
        architecture="chroma",
        implementation="https://huggingface.co/lodestones/Chroma",
        base_version="chroma",
    )


def _layers() -> Iterator[Original]:
    yield from _flux.double_blocks("net.0.proj", "net.2")
    yield from _flux.single_blocks()
    yield from _flux.embedders({f"{_GUIDANCE}layers.{{}}": f"{_GUIDANCE}layers.{{}}"})
    yield from same(f"{_GUIDANCE}in_proj", f"{_GUIDANCE}out_proj")
    yield from renamed(_flux.ENDS)
