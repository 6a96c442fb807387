"""Files of embeddings: as other programs write and read them, and strangers' files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.lora import embeddings
from tests.fuzzing import damaged, fuzzed, harmless
from tests.lora.test_files import headers_changed, renamed

SD = {"text_encoder": "emb_params"}
SDXL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def test_what_is_written_is_what_others_read(tmp_path: Path) -> None:
    rows = {"text_encoder": torch.randn(2, 4), "text_encoder_2": torch.randn(2, 6)}
    [file] = embeddings.write(tmp_path, {"<my-style>": rows}, SDXL)
    assert file == tmp_path / "embeddings" / "my-style.safetensors"
    assert embeddings.files_beside(tmp_path / "pytorch_lora_weights.safetensors") == [file]
    tensors = load_file(file)
    assert tensors.keys() == {"clip_l", "clip_g"} and torch.equal(tensors["clip_g"], rows["text_encoder_2"])
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"token": "<my-style>"}
    found = embeddings.read(file, SDXL)
    assert found.token == "<my-style>" and all(torch.equal(found.vectors[name], rows[name]) for name in rows)


@pytest.mark.parametrize("name", ["emb_params", "<cat-toy>", "clip_l", "*"])
def test_of_one_text_encoder_any_name_will_do(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(4, dtype=torch.float16)}, tmp_path / "toy.safetensors")
    found = embeddings.read(tmp_path / "toy.safetensors", SD)
    assert found.token == "toy" and found.vectors["text_encoder"].shape == (1, 4)
    assert found.vectors["text_encoder"].dtype == torch.float32


def test_families_name_what_their_stock_pipelines_load() -> None:
    import diffusers

    for name in registry.names("families"):
        family = registry.load("families", name)
        assert set(family.EMBEDDING_KEYS) <= set(family.TEXT_ENCODERS)
        if family.EMBEDDING_KEYS:
            assert all(hasattr(getattr(diffusers, each), "load_textual_inversion") for each in family.PIPELINES)
    keys = {name: registry.load("families", name).EMBEDDING_KEYS for name in ("sd", "sdxl", "flux", "sd3")}
    assert keys == {"sd": SD, "sdxl": SDXL, "flux": {"text_encoder": "clip_l"}, "sd3": {}}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "it has nothing"),
        ({"clip_l": (1, 4)}, "clip_l and clip_g of"),
        ({"clip_l": (1, 4), "clip_g": (1, 6), "t5": (1, 8)}, "it has clip_g"),
        ({"clip_l": (2, 2, 4), "clip_g": (1, 6)}, "of [n, d]"),
        ({"clip_l": (65, 4), "clip_g": (65, 6)}, "n up to 64"),
        ({"clip_l": (0, 4), "clip_g": (0, 6)}, "n up to 64"),
        ({"clip_l": (2, 4), "clip_g": (1, 6)}, "other numbers of vectors"),
    ],
)
def test_what_is_no_file_of_embeddings(tmp_path: Path, tensors: dict, words: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "sks.safetensors")
    with pytest.raises(UserError, match=re.escape(words)):
        embeddings.read(tmp_path / "sks.safetensors", SDXL)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "sks.safetensors"
    with pytest.raises(UserError, match="no such file of embeddings"):
        embeddings.read(file, SD)
    with pytest.raises(UserError, match=r"read as \.safetensors only"):
        embeddings.read(tmp_path / "sks.pt", SD)
    save_file({"emb_params": torch.tensor([[1.0, torch.inf]])}, file)
    with pytest.raises(UserError, match="not finite"):
        embeddings.read(file, SD)
    save_file({"emb_params": torch.tensor([[1, 2]])}, file)
    with pytest.raises(UserError, match="not finite numbers"):
        embeddings.read(file, SD)
    save_file({"emb_params": torch.ones(1, 2)}, file, {"token": "A B"})
    with pytest.raises(UserError, match="'A B' cannot be a token"):
        embeddings.read(file, SD)
    save_file({"emb_params": torch.ones(1, 2)}, file)
    with pytest.raises(UserError, match="takes no embeddings of new tokens"):
        embeddings.read(file, {})
    save_file({"emb_params": torch.ones(1, 2)}, tmp_path / "sks2.safetensors")
    with pytest.raises(UserError, match="cannot be told apart"):
        embeddings.read_all([file, tmp_path / "sks2.safetensors"], SD)


def _sound() -> bytes:
    return save({"clip_l": torch.ones(2, 4), "clip_g": torch.ones(2, 6)}, {"token": "<my-style>"})


@pytest.fixture(scope="module")
def odd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "sks.safetensors"


@fuzzed
@given(st.one_of(damaged(_sound()), headers_changed(_sound()), renamed(_sound())))
def test_fuzz_embeddings(odd_file: Path, content: bytes) -> None:
    odd_file.write_bytes(content)
    found = harmless(lambda: embeddings.read(odd_file, SDXL))
    assert isinstance(found, UserError) or all(bool(rows.isfinite().all()) for rows in found.vectors.values())
