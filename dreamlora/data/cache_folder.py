"""Where what is kept between runs lies."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(latents_cache_dir: Path | None = None) -> Path:
    """``latents_cache_dir``, or the environment's DREAMLORA_CACHE, or ~/.cache/dreamlora."""
    return Path(latents_cache_dir or os.environ.get("DREAMLORA_CACHE") or Path.home() / ".cache" / "dreamlora")
