"""Files with some tensors changed: the others stay byte for byte, of whatever type they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamlora.errors import UserError, WriteError
from dreamlora.models.checkpoint import LayerWeight
from dreamlora.models.rewriting import Rewriting, rewrite

TENSORS: dict[str, Tensor] = {
    "a.weight": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "b.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.ones(7).half(),
    "whole": torch.arange(5),
    "mark": torch.tensor(True),
    "number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 4),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "ö with space": torch.zeros(2),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt", "title": "ä"})
    return tmp_path / "model.safetensors"


def raw(file: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    body = content[8 + length :]
    parts = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}
    assert (8 + length) % 8 == 0 and sum(map(len, parts.values())) == len(body)
    kinds = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    return {"metadata": metadata, **kinds}, parts


def test_nothing_to_change_changes_nothing(file: Path, tmp_path: Path) -> None:
    total = rewrite(file, tmp_path / "new.safetensors", Rewriting({}))
    assert raw(file) == raw(tmp_path / "new.safetensors")
    assert total == sum(tensor.nbytes for tensor in TENSORS.values())


def test_changes_are_rounded_to_the_precision_of_the_file(file: Path, tmp_path: Path) -> None:
    third = Rewriting({"a.weight": lambda tensor: tensor.float() + 1 / 3}, metadata={"title": "new"})
    rewrite(file, tmp_path / "new.safetensors", third)
    found = load_file(tmp_path / "new.safetensors")
    assert torch.equal(found["a.weight"], (TENSORS["a.weight"].float() + 1 / 3).bfloat16())
    (before, old), (after, new) = raw(file), raw(tmp_path / "new.safetensors")
    assert after["metadata"] == {"title": "new"}
    assert {name for name in old if old[name] != new[name]} == {"a.weight"}
    assert {name for name in before if before[name] != after[name]} == {"metadata"}


def test_another_precision(file: Path, tmp_path: Path) -> None:
    """Of what is named and of floating-point numbers of ordinary kinds."""
    change = Rewriting({"b.weight": lambda tensor: tensor * 2}, torch.float16, lambda name: name != "number")
    total = rewrite(file, tmp_path / "new.safetensors", change)
    found = load_file(tmp_path / "new.safetensors")
    half = {"a.weight", "b.weight", "half", "nothing", "ö with space"}
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float16} == half
    assert torch.equal(found["b.weight"], (TENSORS["b.weight"] * 2).half())
    assert found["number"].dtype == torch.float32 and found["float8"].dtype == torch.float8_e4m3fn
    assert total == sum(tensor.nbytes for tensor in found.values())
    with safe_open(tmp_path / "new.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "title": "ä"}


@pytest.mark.parametrize(("factor", "words"), [(1e6, "does not fit float16 any more"), (float("nan"), "is not finite")])
def test_numbers_that_no_file_should_have(file: Path, tmp_path: Path, factor: float, words: str) -> None:
    change = Rewriting({"half": lambda tensor: tensor.float() * factor})
    with pytest.raises(UserError, match=words):
        rewrite(file, tmp_path / "new.safetensors", change)
    assert sorted(tmp_path.iterdir()) == [file]


def test_full_disk(file: Path, tmp_path: Path) -> None:
    def full(tensor: Tensor) -> Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match="the disk is full"):
        rewrite(file, tmp_path / "new.safetensors", Rewriting({"half": full}))
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "place",
    [
        SimpleNamespace(first=0, swapped=False, transposed=False, shape=(6, 4)),
        SimpleNamespace(first=2, swapped=False, transposed=False, shape=(3, 4)),
        SimpleNamespace(first=0, swapped=True, transposed=False, shape=(6, 4)),
        SimpleNamespace(first=0, swapped=False, transposed=True, shape=(4, 6)),
    ],
)
def test_layers_in_tensors(place: SimpleNamespace) -> None:
    """What is put where a layer is, is what is read there then, and nothing else has changed."""
    whole = torch.randn(6, 4)
    layer = LayerWeight(Path("x"), "x", **vars(place))
    before, weight = whole.clone(), torch.randn(*place.shape)
    assert layer.of(whole).shape == place.shape
    layer.put(whole, layer.of(whole).clone())
    assert torch.equal(whole, before)
    layer.put(whole, weight)
    assert torch.equal(layer.of(whole), weight)
    assert int((whole != before).sum()) == weight.numel()


def test_swapped_halves() -> None:
    layer = LayerWeight(Path("x"), "x", (4, 1), swapped=True)
    assert layer.of(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).flatten().tolist() == [3.0, 4.0, 1.0, 2.0]
