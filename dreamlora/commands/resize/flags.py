"""``dreamlora resize``: the flags. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dreamlora.commands.written_lora import Rank, Written
from dreamlora.errors import UserError


@dataclass(frozen=True)
class ResizeConfig:
    """Give a LoRA a lower rank: the best approximation of every layer, and what it loses."""

    lora: Path
    """A LoRA file, or a folder with one; the flag's name may be left out."""
    written: Written
    kept: Rank = field(default_factory=Rank)
    pretrained_model_name_or_path: str | None = None
    """The base model, for the names of its layers, where these are not those of a published model."""
    family: str | None = None
    """Family of the model that the LoRA is for. Default: seen from the names of its layers."""
    revision: str | None = None
    """Branch, tag or commit of the base model's hub repository."""
    cache_dir: Path | None = None
    """Where downloads from the hub, and what single files are converted to, are kept."""
    json: bool = False
    """Print the layers as JSON instead of a table."""

    def __post_init__(self) -> None:
        if not self.kept.given:
            raise UserError("to which rank? Give --rank 16, --energy 0.99 or --sv_ratio 20")
