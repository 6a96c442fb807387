"""Images that do not fit into memory as a whole are encoded in tiles, all of a run alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dreamlora.families import sd
from dreamlora.interfaces import Components, Latents
from dreamlora.runfolder import RunFolder
from tests.training.conftest import flags_of, photos, train_with  # noqa: F401 - a fixture

Train = Callable[..., RunFolder]


class Memory:
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
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
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


def test_where_a_whole_image_does_not_fit_all_are_encoded_in_tiles(train: Train, memory: Memory) -> None:
    run = train("run")
    assert memory.tiled[0] is False and len(memory.tiled) > 2 and all(memory.tiled[1:])
    assert yaml.safe_load(run.config_file.read_text(encoding="utf-8"))["vae_tiling"] is True
    [told] = [text for text in run.summary()["warnings"] if "in tiles" in text]
    assert told.startswith("memory does not suffice for encoding whole images")
    memory.suffices = True
    assert not same(train("whole"), run), "entries of the cache tell tiles from whole images"
    memory.tiled.clear()
    assert same(train("asked", "--vae_tiling"), run) and not memory.tiled, "those of before are there"


def test_a_resumed_run_goes_on_with_its_own_latents(train: Train, memory: Memory) -> None:
    run = train("run")
    train("resumed", "--max_train_steps", "2")
    memory.suffices, before = True, len(memory.tiled)
    resumed = train("resumed", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert same(resumed, run) and all(memory.tiled[before:])
    done = json.loads(resumed.summary_file.read_text(encoding="utf-8"))
    train("resumed", "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    again = json.loads(resumed.summary_file.read_text(encoding="utf-8"))
    assert again == done, "there was nothing left to do"


def test_images_are_never_tiled_if_that_was_asked_for(train: Train, memory: Memory) -> None:
    with pytest.raises(Exception, match=r"in the stage 'encoding images'.*no --no_vae_tiling"):
        train("run", "--no_vae_tiling")
    assert memory.tiled == [False]
