"""Options of the commands that write a LoRA: where, in which format, precision and rank. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreamlora.config.ranges import above, at_least, spelled
from dreamlora.errors import UserError


@dataclass(frozen=True)
class Written:
    """What is written."""

    output: Path
    """What is written: a name that ends in .safetensors, or for a model a new folder. Nothing may be there yet."""
    format: str | None = None
    """Format of a LoRA: {lora.formats}. Default: that of the (first) LoRA that was given, else diffusers."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Precision of what is written. Default: that of what was given; of the LoRA of extract fp32."""

    def __post_init__(self) -> None:
        if self.format is not None:
            object.__setattr__(self, "format", spelled("format", self.format, "lora.formats"))


@dataclass(frozen=True)
class Rank:
    """How much of every layer's change is kept; of several bounds the lowest rank that one of them gives counts."""

    rank: int | None = None
    """The most ranks."""
    energy: float | None = None
    """As few ranks as keep this share of the change's energy, the squares of its singular values: such as 0.99."""
    sv_ratio: float | None = None
    """Singular values are kept down to the largest one divided by this (kohya's sv_ratio)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        above(self, 1, "sv_ratio")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"--energy is a share above 0, and 1 at most (got {self.energy})")

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return (self.rank, self.energy, self.sv_ratio) != (None, None, None)
