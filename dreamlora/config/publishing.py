"""What is written into a LoRA's file about it, for those who get it."""

from __future__ import annotations

from dataclasses import dataclass

from dreamlora.config.ranges import short


@dataclass(frozen=True)
class Label:
    """What the LoRA's file says of itself, as Civitai, Forge and ComfyUI show it: nothing of paths or machines."""

    metadata_title: str | None = None
    """Its title. Default: the run folder's name."""
    metadata_author: str | None = None
    """Who made it."""
    metadata_description: str | None = None
    """What it is; Markdown is understood by many programs."""
    metadata_license: str | None = None
    """Its licence, such as CC-BY-SA-4.0."""
    metadata_tags: str | None = None
    """Its tags, with commas between them."""
    metadata_captions: bool = True
    """Write what captions are made of: how often which tag was seen, and the phrase that calls the subject up."""
    metadata: bool = True
    """Write any of this, and how the LoRA was trained; --no_metadata leaves what programs need to apply it."""

    def __post_init__(self) -> None:
        texts = ("title", "author", "description", "license", "tags")
        short(self, *(f"metadata_{name}" for name in texts))
