"""Tokenizers of strangers: their settings and vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer, T5TokenizerFast

from dreamlora.errors import UserError
from dreamlora.models import tokenizer as tokenizers
from dreamlora.models.building import Form, load_part
from dreamlora.models.fetching import Place
from dreamlora.models.tokenizer import tokenizer_class
from tests import tinymodels
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless
from tests.hostile import edit_json, nothing_foreign
from tests.models import parts_of_models

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


_ADDED = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
_UNLIMITED = int(1e30)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen": (
        "Qwen2Tokenizer",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(257 + i): {"content": mark, **_ADDED}
                for i, mark in enumerate(("<|im_start|>", "<|im_end|>", "<|image_pad|>"))
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": {},
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    ),
    "Mistral's, in a processor": (
        "PreTrainedTokenizerFast",
        {
            "added_tokens_decoder": {
                str(257 + i): {"content": mark, **_ADDED}
                for i, mark in enumerate(("<|im_start|>", "<|im_end|>", "<|image_pad|>"))
            },
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "legacy": True,
            "model_max_length": _UNLIMITED,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "processor_class": "PixtralProcessor",
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
        },
    ),
    "Gemma": (
        "GemmaTokenizerFast",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<bos>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "model_max_length": _UNLIMITED,
            "pad_token": "<pad>",
            "padding_side": "left",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
        },
    ),
    "T5": (
        "T5TokenizerFast",
        {
            "add_prefix_space": None,
            "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
            "clean_up_tokenization_spaces": True,
            "eos_token": "</s>",
            "extra_ids": 100,
            "legacy": True,
            "model_max_length": 512,
            "pad_token": "<pad>",
            "sp_model_kwargs": {},
            "tokenizer_class": "T5Tokenizer",
            "unk_token": "<unk>",
        },
    ),
}
"""Settings as published models have them, of which we take what makes a difference."""
TEXTS = ("a cat", "", "A <|im_start|>user\n cat<|im_end|>", "</s> b <eos>", "é ü 1 2")


def assert_same(ours: Any, theirs: Any) -> None:
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    longest = {"padding": "max_length", "max_length": 40, "truncation": True}
    assert ours(list(TEXTS), **longest).input_ids == theirs(list(TEXTS), **longest).input_ids
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "padding_side", "truncation_side", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.get_vocab() == theirs.get_vocab() and type(ours) is type(theirs)


@pytest.mark.parametrize("name", parts_of_models.TOKENIZERS)
def test_a_tokenizer_is_what_transformers_makes_of_it(name, tmp_path):
    parts_of_models.TOKENIZERS[name]().save_pretrained(tmp_path)
    part_class = getattr(transformers, name)
    with nothing_foreign():
        ours = load(tmp_path, part_class)
    assert_same(ours, part_class.from_pretrained(tmp_path))


@pytest.mark.parametrize(("name", "says"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_settings_say_to_us_what_they_say_to_transformers(name, says, tmp_path):
    parts_of_models.TOKENIZERS[name]().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says), encoding="utf-8")
    part_class = getattr(transformers, name)
    assert_same(load(tmp_path, part_class), part_class.from_pretrained(tmp_path))


def test_qwens_vocabulary_and_merges_alone_are_enough(tmp_path):
    """As Qwen-Image has them, with the added tokens in files of their own."""
    parts_of_models.qwen_tokenizer().save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (tmp_path / "tokenizer.json").unlink()
    for name, content in (
        ("vocab.json", model["vocab"] | {"at": 260}),
        ("tokenizer_config.json", PUBLISHED["Qwen"][1]),
        ("added_tokens.json", {"<|im_start|>": 257, "<|im_end|>": 258, "<|image_pad|>": 259}),
        ("special_tokens_map.json", {"eos_token": {"content": "<|im_end|>", **_ADDED}, "pad_token": "<|endoftext|>"}),
    ):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na t\n", encoding="utf-8")
    part_class = transformers.Qwen2Tokenizer
    assert_same(load(tmp_path, part_class), part_class.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("name", "vocabulary"), [("T5TokenizerFast", "spiece.model"), ("LlamaTokenizerFast", "tokenizer.model")]
)
def test_sentencepiece_is_asked_for_in_words(name, vocabulary, tmp_path, monkeypatch):
    (tmp_path / vocabulary).write_bytes(b"\n\0")
    monkeypatch.setattr(tokenizers, "find_spec", lambda module: None)
    words = rf"vocabulary as {vocabulary} alone, which needs sentencepiece: pip install sentencepiece protobuf, or put"
    with pytest.raises(UserError, match=words) as error:
        load(tmp_path, getattr(transformers, name))
    assert "\n" not in str(error.value)


TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja")


def test_a_template_is_not_even_read(folder):
    for name in TEMPLATES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"chat_template": "{{ 1 }}"}', encoding="utf-8")
    edit_json(folder / "tokenizer_config.json", chat_template="{{ 1 }}")
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
