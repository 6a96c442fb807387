"""The embedded default: a miniature Stable Diffusion pipeline and CLIP, pretrained on a procedural world."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def pipeline_path() -> Path:
    """The folder that `StableDiffusionPipeline.from_pretrained` loads."""
    return _WEIGHTS / "pipeline"


def clip_path() -> Path:
    """The folder that `CLIPModel.from_pretrained` loads (tokenizer and image processor included)."""
    return _WEIGHTS / "clip"
