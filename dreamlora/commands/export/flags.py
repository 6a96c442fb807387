"""``dreamlora export``: the flags. Torch is imported only after they are known to be right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreamlora.config.ranges import respell
from dreamlora.errors import UserError


@dataclass(frozen=True)
class ExportConfig:
    """Write a LoRA as another program reads it: dreamlora export <LoRA or run> --format kohya --output FILE."""

    lora: Path
    """A LoRA file of any program, a folder with one, or a run's folder; the flag's name may be left out."""
    format: str
    """The format: {lora.formats}."""
    output: Path
    """File to write, a .safetensors; for peft a folder."""
    dtype: Literal["fp16", "bf16", "fp32"] | None = None
    """Precision of the factors. Default: as they are."""
    overwrite: bool = False
    """Replace what lies at --output."""
    trust_runs: bool = False
    """The run is your own: open the base model that its config.yaml names outside its folder."""
    pretrained_model_name_or_path: str | None = None
    """The base model, for the names and sizes of its layers. Default: the one that the run was trained on."""
    family: str | None = None
    """Model family, instead: its layers are then those of the published model. Default: told by the LoRA's names."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    cache_dir: Path | None = None
    """Where downloads from the hub, and what single files are converted to, are kept."""

    def __post_init__(self) -> None:
        respell(self, "format", "lora.formats")
        if self.family is not None:
            respell(self, "family", "families")
        folder = self.format == "peft"
        if (self.output.suffix == ".safetensors") == folder:
            what = "a folder" if folder else "a .safetensors file"
            raise UserError(f"--output {self.output}: the format {self.format} is {what}")
