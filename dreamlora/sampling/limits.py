"""How much a call of the pipeline may take where memory is short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dreamlora.models.tiling import can_tile


@dataclass
class CallLimits:
    """What a call of the pipeline may take. Where memory does not suffice, it is lowered for all calls to come.

    Attributes:
        images: at a time, at most; None: as many as are wanted.
        tiles: whether the autoencoder works in tiles (``models.tiling``); None: where it must.
    """

    images: int | None = None
    tiles: bool | None = None

    def lower(self, images: int, vae: Any) -> str:
        """After a call for so many images: what is done differently from now on, in words; empty if nothing is left."""
        if images > 1:
            self.images = images // 2
            return f"memory does not suffice for {images} images at a time: from now on {self.images} are drawn"
        if self.tiles is None and can_tile(vae):
            self.tiles = True
            return "memory does not suffice for a whole image: from now on the autoencoder decodes large ones in tiles"
        return ""
