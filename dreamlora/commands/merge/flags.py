"""``dreamlora merge``: the flags. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dreamlora.commands.written_lora import Rank, Written
from dreamlora.config.ranges import finite
from dreamlora.errors import UserError


@dataclass(frozen=True)
class MergeConfig:
    """Put LoRAs into a base model for good; or, without a base model, several LoRAs into one."""

    lora: tuple[Path, ...]
    """LoRA files, or folders with one; the flag's name may be left out."""
    written: Written
    kept: Rank = field(default_factory=Rank)
    lora_scales: tuple[float, ...] = (1.0,)
    """Strength of every LoRA, in their order, or one for all; may be negative."""
    pretrained_model_name_or_path: str | None = None
    """The base model: a folder, a hub name or a .safetensors file. Default: none, and the LoRAs become one LoRA."""
    family: str | None = None
    """Model family. Default: read from the base model, or seen from the names of the LoRAs' layers."""
    revision: str | None = None
    """Branch, tag or commit of the base model's hub repository."""
    variant: str | None = None
    """Weight variant of the base model's hub repository, such as fp16."""
    cache_dir: Path | None = None
    """Where downloads from the hub, and what single files are converted to, are kept."""
    json: bool = False
    """Print what was merged as JSON."""

    def __post_init__(self) -> None:
        if not self.lora:
            raise UserError("--lora needs at least one file or folder")
        finite(self, "lora_scales")
        if len(self.lora_scales) not in (1, len(self.lora)):
            raise UserError(
                f"--lora_scales takes one number, or one for each of the {len(self.lora)} LoRAs (got "
                f"{len(self.lora_scales)})"
            )
        if self.pretrained_model_name_or_path is None:
            return
        if self.kept.given:
            raise UserError("--rank, --energy and --sv_ratio are for a LoRA, and a model has no rank: leave them out")
        if self.written.format is not None:
            raise UserError("--format is for a LoRA: a model is written in the format of the base model; leave it out")

    @property
    def strengths(self) -> tuple[float, ...]:
        """One for each LoRA."""
        return self.lora_scales if len(self.lora_scales) > 1 else self.lora_scales * len(self.lora)
