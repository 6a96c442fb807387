"""The small models with more blocks: as many as it takes to see an order among them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import diffusers
import torch

LAYERS = 5


def deepened(folder: Path, copy: Path) -> Path:
    """A copy of a small pipeline whose denoiser has several blocks of each kind, with other random weights.

    Args:
        folder: of the pipeline; left as it is.
        copy: where the copy goes.
    """
    shutil.copytree(folder, copy)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = "unet" if "unet" in index else "transformer"
    part = getattr(diffusers, index[name][1])
    config = dict(part.load_config(copy / name))
    for key, value in config.items():
        if type(value) is int and re.fullmatch(r"(num|n)_(\w+_)?layers", key) and key != "num_text_layers":
            config[key] = LAYERS
        elif key == "transformer_layers_per_block":
            config[key] = 2
        elif key == "llama_layers":  # one for each block
            config[key] = value * LAYERS
    torch.manual_seed(1)
    shutil.rmtree(copy / name)
    part.from_config(config).save_pretrained(copy / name)
    return copy
