"""Which files hold a model's weights, and what they may be."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from safetensors.torch import save, save_file

from dreamlora.archives import HEADER_BYTES
from dreamlora.errors import UserError
from dreamlora.models.fetching import Place
from dreamlora.models.weights import DIFFUSERS, TRANSFORMERS, find_weights, read_header
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

TENSORS = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), "position_ids": torch.arange(4)}
INDEX = {"metadata": {"total_size": 64}, "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("x-1.safetensors", "x-2.safetensors"):
        save_file(TENSORS, tmp_path / name)
    torch.save(TENSORS, tmp_path / "evil.bin")
    return Place(str(tmp_path), None, None)


def write_index(place: Place, content: object, name: str = "model.safetensors.index.json") -> None:
    Path(place.path, name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "variant", "name"),
    [
        (TRANSFORMERS, None, "model.safetensors.index.json"),
        (TRANSFORMERS, "fp16", "model.safetensors.index.fp16.json"),
        (DIFFUSERS, None, "diffusion_pytorch_model.safetensors.index.json"),
        (DIFFUSERS, "fp16", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        (DIFFUSERS, "fp16", "diffusion_pytorch_model.safetensors.fp16.index.json"),
    ],
)
def test_an_index_names_files_beside_it(place, names, variant, name):
    write_index(place, INDEX, name)
    found = find_weights(place, names, variant, allow_pickle=False)
    assert [file.name for file in found.files] == ["x-1.safetensors", "x-2.safetensors"]
    assert (found.tensors, found.numbers) == (6, 24)
    for bad in ("evil.bin", "../x-1.safetensors", "/etc/x.safetensors", "a/b.safetensors", ".safetensors", "..", ""):
        write_index(place, {"metadata": {}, "weight_map": {"a": "x-1.safetensors", "b": bad}}, name)
        for allow_pickle in (False, True):
            with pytest.raises(UserError, match=r"names '.*', where only files <name>\.safetensors beside it"):
                find_weights(place, names, variant, allow_pickle)
    write_index(place, {"metadata": {}, "weight_map": {"a": "x-3.safetensors"}}, name)
    with pytest.raises(UserError, match=r"no x-3\.safetensors"):
        find_weights(place, names, variant, allow_pickle=False)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {"a": "b"}}, {"metadata": {}, "weight_map": {"a": 5}}])
def test_an_index_of_another_kind(place, content):
    write_index(place, content)
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors\.index\.json"):
        find_weights(place, TRANSFORMERS, None, allow_pickle=False)


def test_an_index_of_pickles_is_read_only_where_they_are_allowed(place):
    write_index(place, {"metadata": {}, "weight_map": {"a": "evil.bin"}}, "pytorch_model.bin.index.json")
    with pytest.raises(UserError, match=r"expected as model\.safetensors"):
        find_weights(place, TRANSFORMERS, None, allow_pickle=False)
    assert find_weights(place, TRANSFORMERS, None, allow_pickle=True).read().keys() == TENSORS.keys()
    write_index(place, {"metadata": {}, "weight_map": {"a": "../evil.bin"}}, "pytorch_model.bin.index.json")
    with pytest.raises(UserError, match=r"only files <name>\.bin beside it"):
        find_weights(place, TRANSFORMERS, None, allow_pickle=True)


@pytest.mark.parametrize("length", [HEADER_BYTES + 1, 100_000_000, 10**12, 2**63, 2**64 - 1, 0, 2, 10**4])
def test_header_bombs(tmp_path, length):
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    if length != 2:
        with pytest.raises(UserError, match="not a safetensors file"):
            harmless_header(file)
        return
    assert harmless_header(file) == {}


def harmless_header(file: Path) -> dict[str, int]:
    found = harmless(lambda: read_header(file))
    if isinstance(found, Exception):
        raise found
    return found


def test_other_files(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8")
    with pytest.raises(UserError, match="git lfs pull"):
        read_header(file)
    save_file({"a": torch.zeros(3, dtype=torch.uint8)}, file)
    with pytest.raises(UserError, match=r"'a' is of type U8: files of quantized weights.*--base_precision"):
        read_header(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="pipe or device"):
        read_header(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name in ("x-1.safetensors", "x-2.safetensors"):
        save_file(TENSORS, folder / name)
    return folder


@fuzzed
@given(changed(INDEX))
def test_fuzz_index(folder, content):
    (folder / "model.safetensors.index.json").write_bytes(as_json(content))
    found = harmless(lambda: find_weights(Place(str(folder), None, None), TRANSFORMERS, None, False))
    assert isinstance(found, UserError) or {file.parent for file in found.files} == {folder}


@fuzzed
@given(damaged(save(TENSORS)))
def test_fuzz_safetensors(folder, content):
    file = folder / "damaged.safetensors"
    file.write_bytes(content)
    harmless(lambda: read_header(file), FileNotFoundError)
