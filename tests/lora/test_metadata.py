"""Headers of LoRA files: in one order, with the hash that other programs compute, and what is carried over."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from dreamlora.lora.metadata import carried, hashes_of, serialised

TENSORS = {"b.lora_A.weight": torch.arange(6.0).reshape(2, 3), "a.alpha": torch.tensor(2.0, dtype=torch.bfloat16)}
DESCRIBED = {"modelspec.implementation": "diffusers", "ss_seed": "1", "modelspec.title": 'a "dog", größer'}


def hash_of(data: bytes) -> str:
    """As sd-webui-additional-networks computes it: of all that comes after the header."""
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_a_file_holds_what_was_given(tmp_path):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(serialised(TENSORS, DESCRIBED))
    found = load_file(file)
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    with safe_open(file, "pt") as opened:
        assert opened.metadata().items() >= {**DESCRIBED, "format": "pt"}.items()


def test_the_hash_is_that_of_the_tensors_bytes():
    data = serialised(TENSORS, DESCRIBED)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata["sshs_model_hash"] == hash_of(data) == hash_of(save(TENSORS))
    assert metadata["modelspec.hash_sha256"] == "0x" + hash_of(data)
    assert hash_of(serialised({**TENSORS, "a.alpha": torch.tensor(3.0)}, DESCRIBED)) != hash_of(data)


def test_equal_content_gives_equal_bytes():
    mixed = dict(reversed(DESCRIBED.items()))
    assert serialised(dict(reversed(TENSORS.items())), mixed) == serialised(TENSORS, DESCRIBED)


def test_without_a_description_there_is_no_hash():
    header = serialised(TENSORS, {})
    assert b"sshs_model_hash" not in header and b"hash_sha256" not in header


def test_what_is_true_of_the_tensors_alone_is_not_carried_over():
    data = serialised(TENSORS, {**DESCRIBED, "lora_adapter_metadata": "{}"})
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert carried(metadata) == DESCRIBED


def test_tensors_that_share_memory_or_are_no_rows(tmp_path: Path):
    both = torch.arange(6.0).reshape(2, 3)
    data = serialised({"a": both.T.clone().T, "b": both}, {})
    (tmp_path / "x.safetensors").write_bytes(data)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], both)


def test_a_base_model_in_one_file_has_kohyas_hashes(tmp_path):
    """As its ``train_util.model_hash`` and ``calculate_sha256`` compute them."""
    data = bytes(range(256)) * 4096 + b"x" * 0x10000 + b"rest"
    file = tmp_path / "base.safetensors"
    file.write_bytes(data)
    assert hashes_of(file) == {
        "ss_new_sd_model_hash": hashlib.sha256(data).hexdigest(),
        "ss_sd_model_hash": hashlib.sha256(b"x" * 0x10000).hexdigest()[:8],
    }
