"""Prompts and images before the training: what decides an entry of the cache, and images too large for the memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dreamlora.cli.parse import parse_run
from dreamlora.families import sd
from dreamlora.interfaces import Components, Latents
from dreamlora.models.parts import Parts
from dreamlora.run import encoding, opening
from dreamlora.run.context import RunContext
from dreamlora.runfolder import RunFolder
from tests.fakemps import MPS, Bus
from tests.training.conftest import flags_of, photos, train_with  # noqa: F401 - a fixture

PROMPTS = ["a cat", "a dog"]
Train = Callable[..., RunFolder]


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


class Card:
    """Takes the place of the family's ``encode_images``.

    Attributes:
        suffices: for images as a whole.
        tiled: of every call, whether it was in tiles.
    """

    def __init__(self) -> None:
        self.suffices = False
        self.tiled: list[bool] = []
        self._original = sd.encode_images

    def encode_images(self, vae: Components, pixels: torch.Tensor) -> Latents:
        self.tiled.append(vae["vae"].use_tiling)
        if not self.suffices and not vae["vae"].use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")
        return self._original(vae, pixels)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Card:
    memory = Card()
    monkeypatch.setattr(sd, "encode_images", memory.encode_images)
    return memory


@pytest.fixture
def train(photos: Path, sd_folder: Path, tmp_path: Path) -> Train:  # noqa: F811
    few = [
        "--resolution",
        "32",
        "--max_train_steps",
        "4",
        "--sample_steps",
        "0",
        "--eval_steps",
        "0",
        "--no_parity_check",
    ]

    def train(name: str, *more: Any) -> RunFolder:
        return train_with([*flags_of(photos, tmp_path / "cache", sd_folder, tmp_path / name), *few, *more])

    return train


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.lora_file)


def same(first: RunFolder, second: RunFolder) -> bool:
    return all(torch.equal(tensor, weights(second)[name]) for name, tensor in weights(first).items())


def test_where_a_whole_image_does_not_fit_all_are_encoded_in_tiles(train: Train, memory: Card) -> None:
    run = train("run")
    assert memory.tiled[0] is False and len(memory.tiled) > 2 and all(memory.tiled[1:])
    assert yaml.safe_load(run.config_file.read_text(encoding="utf-8"))["vae_tiling"] is True
    [told] = [text for text in run.summary()["warnings"] if "in tiles" in text]
    assert told.startswith("memory does not suffice for encoding whole images")
    memory.suffices = True
    assert not same(train("whole"), run), "entries of the cache tell tiles from whole images"
    memory.tiled.clear()
    assert same(train("asked", "--vae_tiling"), run) and not memory.tiled, "those of before are there"


def test_a_resumed_run_goes_on_with_its_own_latents(train: Train, memory: Card) -> None:
    run = train("run")
    train("resumed", "--max_train_steps", "2")
    memory.suffices, before = True, len(memory.tiled)
    resumed = train("resumed", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert same(resumed, run) and all(memory.tiled[before:])
    done = json.loads(resumed.summary_file.read_text(encoding="utf-8"))
    train("resumed", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    again = json.loads(resumed.summary_file.read_text(encoding="utf-8"))
    assert again == done, "there was nothing left to do"


def test_images_are_never_tiled_if_that_was_asked_for(train: Train, memory: Card) -> None:
    with pytest.raises(Exception, match=r"in the stage 'encoding images'.*no --no_vae_tiling"):
        train("run", "--no_vae_tiling")
    assert memory.tiled == [False]
