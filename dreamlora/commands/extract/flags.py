"""``dreamlora extract``: the flags. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dreamlora.commands.written_lora import Rank, Written
from dreamlora.errors import UserError


@dataclass(frozen=True)
class ExtractConfig:
    """Make a LoRA of what a fine-tuned model has changed: dreamlora extract <tuned model> --rank 32 --output a file."""

    tuned: str
    """The fine-tuned model: a folder, a hub name or a .safetensors file; the flag's name may be left out."""
    pretrained_model_name_or_path: str
    """The base model that it was made from, or any other of the same architecture."""
    written: Written
    kept: Rank = field(default_factory=Rank)
    family: str | None = None
    """Model family; by default read from the pipeline's model_index.json, or seen from the names of tensors."""
    revision: str | None = None
    """Branch, tag or commit of the base model's hub repository."""
    variant: str | None = None
    """Weight variant of the base model's hub repository, such as fp16."""
    tuned_revision: str | None = None
    """Branch, tag or commit of the fine-tuned model's hub repository."""
    tuned_variant: str | None = None
    """Weight variant of the fine-tuned model's hub repository."""
    cache_dir: Path | None = None
    """Where downloads from the hub, and what single files are converted to, are kept."""
    json: bool = False
    """Print the layers as JSON instead of a table."""

    def __post_init__(self) -> None:
        if not self.kept.given:
            raise UserError("of which rank is the LoRA to be? Give --rank 32, --energy 0.99 or both")
