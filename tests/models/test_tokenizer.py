"""Tokenizers of strangers: their settings and vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5TokenizerFast

from dreamlora.errors import UserError
from dreamlora.models.building import Form, load_part
from dreamlora.models.fetching import Place
from dreamlora.models.tokenizer import tokenizer_class
from tests import tinymodels
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

SD_1_5 = {
    "add_prefix_space": False,
    "bos_token": {
        "__type": "AddedToken",
        "content": "<|startoftext|>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    },
    "do_lower_case": True,
    "eos_token": "<|endoftext|>",
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": "<|endoftext|>",
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": "<|endoftext|>",
    "added_tokens_decoder": {"1": {"content": "x", "lstrip": False, "special": True}},
    "additional_special_tokens": ["<a>"],
}


def load(folder: Path, part_class: type = CLIPTokenizer) -> CLIPTokenizer:
    return load_part(part_class, Place(str(folder), None, None), Form(None))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tinymodels.clip_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_vocabulary_and_merges_alone_are_enough(folder, tmp_path_factory):
    """As Stable Diffusion 1.5 has them, with the settings of its time."""
    old = tmp_path_factory.mktemp("old")
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (old / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (old / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {name: value for name, value in SD_1_5.items() if not name.startswith("add")}
    (old / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    marks = {name: "<|endoftext|>" for name in ("eos_token", "pad_token", "unk_token")}
    (old / "special_tokens_map.json").write_text(json.dumps(marks), encoding="utf-8")
    ours, stock = load(old), CLIPTokenizer.from_pretrained(old)
    for text in ("a cat", "", "<|endoftext|> b", "é ü"):
        assert ours(text).input_ids == stock(text).input_ids == load(folder)(text).input_ids
    assert ours.model_max_length == 77 and ours.pad_token_id == stock.pad_token_id


def test_no_limit_is_read_as_none(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": int(1e30)}), "utf-8")
    assert load(folder).model_max_length == int(1e30)


def test_without_a_vocabulary_there_is_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"incomplete: a CLIPTokenizer needs vocab\.json, merges\.txt, tokenizer\.json"):
        load(folder)


def test_a_template_is_not_even_read(folder):
    (folder / "chat_template.jinja").write_text("{{ 1 }}", encoding="utf-8")
    assert load(folder).chat_template is None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tinymodels.clip_tokenizer().save_pretrained(folder)
    return folder


@fuzzed
@given(changed(SD_1_5))
def test_fuzz_settings(sound, content):
    file = sound / "tokenizer_config.json"
    before = file.read_bytes()
    file.write_bytes(as_json(content))
    harmless(lambda: load(sound))
    harmless(lambda: tokenizer_class(Place(str(sound), None, None)))
    file.write_bytes(before)


@fuzzed
@given(st.data())
def test_fuzz_vocabulary(sound, data):
    file = sound / "tokenizer.json"
    before = file.read_bytes()
    content = json.loads(before)
    content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[-5:])
    changes = changed(content).map(as_json)
    file.write_bytes(data.draw(st.one_of(changes, damaged(before))))
    harmless(lambda: load(sound))
    file.write_bytes(before)


@fuzzed
@given(st.data())
def test_fuzz_unigrams(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "unigrams"
    T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -3.0)], extra_ids=0).save_pretrained(
        folder
    )
    file = folder / "tokenizer.json"
    file.write_bytes(as_json(data.draw(changed(json.loads(file.read_text(encoding="utf-8"))))))
    harmless(lambda: load(folder, T5TokenizerFast))
