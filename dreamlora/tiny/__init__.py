"""The embedded models: miniature pipelines and a CLIP, pretrained on a procedural world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PRESETS = Path(__file__).parent
"""The folder of the presets, files that ``--config`` takes."""

_WEIGHTS = PRESETS / "weights"


@dataclass(frozen=True)
class EmbeddedModel:
    """A pipeline that travels with the package.

    Attributes:
        title: what it is called in reports.
        folder: of the pipeline, below that of the weights.
        preset: the file with what is set for it otherwise than for the default, in all programs; None for the default.
    """

    title: str
    folder: str
    preset: str | None = None


MODELS = {
    "tiny": EmbeddedModel("the embedded model", "pipeline"),
    "tiny-flow": EmbeddedModel("the embedded flow transformer", "flow_pipeline", "preset_flow.yaml"),
}
"""By the name that stands for a model wherever a folder or a name of the hub can stand; the default first."""


def pipeline_path(name: str = "tiny") -> Path:
    """The folder that `DiffusionPipeline.from_pretrained` loads; ``name`` is one of ``MODELS``."""
    return _WEIGHTS / MODELS[name].folder


def clip_path() -> Path:
    """The folder that `CLIPModel.from_pretrained` loads (tokenizer and image processor included)."""
    return _WEIGHTS / "clip"
