"""The embedded default: a miniature Stable Diffusion pipeline and CLIP, pretrained on a procedural world."""

from pathlib import Path

PRESETS = Path(__file__).parent
"""The folder of the presets, files that ``--config`` takes."""

_WEIGHTS = PRESETS / "weights"


def pipeline_path() -> Path:
    """The folder that `StableDiffusionPipeline.from_pretrained` loads."""
    return _WEIGHTS / "pipeline"


def flow_path() -> Path:
    """The folder that `FluxPipeline.from_pretrained` loads: the second model, a flow transformer."""
    return _WEIGHTS / "flow_pipeline"


def clip_path() -> Path:
    """The folder that `CLIPModel.from_pretrained` loads (tokenizer and image processor included)."""
    return _WEIGHTS / "clip"
