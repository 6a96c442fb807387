"""What decides an entry of the cache of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dreamlora.cli.parse import parse_run
from dreamlora.models.parts import Parts
from dreamlora.run import encoding, opening
from dreamlora.run.context import RunContext
from tests.fakemps import MPS, Bus

PROMPTS = ["a cat", "a dog"]


def context_of(folder: Path, images: Path, *more: str) -> RunContext:
    flags = f"--pretrained_model_name_or_path {folder} --instance_data_dir {images} --max_train_steps 2"
    flags += f" --resolution 16 --latents_cache_dir {images}"
    return opening.begin(parse_run([*flags.split(), *more])[0])


def on_device(context: RunContext) -> RunContext:
    context.parts = Parts(context.family, context.source, MPS, torch.float32)
    return context


def test_embeddings_of_another_device_are_made_anew(tiny_folder: Any, tmp_path: Path, bus: Bus) -> None:
    """They are rounded otherwise. Where all is computed on the CPU the flag changes nothing."""
    elsewhere = ("--text_encoder_device", "cpu")
    entries = []
    for context in (
        context_of(tiny_folder("sd"), tmp_path),
        context_of(tiny_folder("sd"), tmp_path, *elsewhere),
        on_device(context_of(tiny_folder("sd"), tmp_path, *elsewhere)),
    ):
        encode = encoding.encode_texts(context, PROMPTS)
        assert len(encode(PROMPTS, {})["prompt_embeds"]) == 2 and not context.parts._loaded.get("text")
        entries.append(len(list(tmp_path.rglob("*.safetensors"))))
    assert entries == [2, 2, 4]
    assert not bus.seen


@pytest.mark.parametrize("count", [3, 40])
def test_many_prompts_share_the_turns_of_the_encoders(count: int, tiny_folder: Any, tmp_path: Path, bus: Bus) -> None:
    prompts = [f"a cat and {number}" for number in range(count)]
    context = on_device(context_of(tiny_folder("sdxl"), tmp_path))
    encoding.encode_texts(context, prompts)
    assert bus.most == 1 and bus.arrivals == 2 * (1 if count == 3 else 2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == count
