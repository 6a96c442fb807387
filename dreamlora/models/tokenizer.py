"""Tokenizers, of the files and settings that we know."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NotRequired

from annotated_types import Ge, Le, Len
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from typing_extensions import TypedDict

from dreamlora.errors import UserError
from dreamlora.files import replacing
from dreamlora.models.fetching import Place
from dreamlora.reading import Schema, UnreadableError, json_of, read_bytes, utf8_text

PROCESSORS = {
    "PixtralProcessor": "PreTrainedTokenizerFast",
    **dict.fromkeys(("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), "Qwen2Tokenizer"),
}
"""The class of the tokenizer inside a processor. What else is in one is for images, and needs torchvision."""
CONFIG = "tokenizer_config.json"
VOCABULARY_BYTES = 2**26
"""Of the largest file: T5's has 2.4 megabytes, Gemma's 34."""
_CONFIG_BYTES = 2**22
_MOST_TOKENS = 100_000

_Text = Annotated[str, Len(0, 200)]


class _Added(TypedDict):
    content: _Text
    lstrip: NotRequired[bool]
    rstrip: NotRequired[bool]
    normalized: NotRequired[bool]
    single_word: NotRequired[bool]
    special: NotRequired[bool]


# the way to write a field with such a name
_Marked = TypedDict("_Marked", {**_Added.__annotations__, "__type": NotRequired[_Text]})  # type: ignore[misc]
_Token = _Text | _Marked


class _Tokens(TypedDict, total=False):
    bos_token: _Token | None
    eos_token: _Token | None
    unk_token: _Token | None
    pad_token: _Token | None
    sep_token: _Token | None
    cls_token: _Token | None
    mask_token: _Token | None
    additional_special_tokens: Annotated[list[_Token], Len(0, _MOST_TOKENS)] | None
    extra_special_tokens: Annotated[list[_Token] | dict[_Text, _Token], Len(0, _MOST_TOKENS)] | None


class _TokenizerSettings(_Tokens, total=False):
    added_tokens_decoder: Annotated[dict[str, _Added], Len(0, _MOST_TOKENS)]
    model_max_length: Annotated[int | float, Ge(1)] | None
    extra_ids: Annotated[int, Ge(0), Le(1000)]
    padding_side: _Text
    truncation_side: _Text
    add_bos_token: bool
    add_eos_token: bool
    add_prefix_space: bool | None
    clean_up_tokenization_spaces: bool | None
    do_lower_case: bool | None
    legacy: bool | None
    split_special_tokens: bool


class _ClassName(TypedDict):
    tokenizer_class: NotRequired[str | None]


_SETTINGS = Schema(_TokenizerSettings)
_CLASS_NAME = Schema(_ClassName)
_TOKENS = Schema(_Tokens)
_NUMBERS = Schema(Annotated[dict[str, Annotated[int, Ge(0), Le(10**7)]], Len(0, _MOST_TOKENS)])

_SCHEMAS = {CONFIG: _SETTINGS, "special_tokens_map.json": _TOKENS, "added_tokens.json": _NUMBERS}


def load_tokenizer(part_class: Any, place: Place) -> Any:
    """The tokenizer at a place, of a class of transformers.

    It is made in a folder of our own, of what was looked through: its class also follows names of files, templates and
    arguments that it finds in and beside its settings.

    Raises:
        UserError: its files are missing, or not what they should be.
        Exception: of many kinds, from the class.
    """
    with TemporaryDirectory(prefix="dreamlora-tokenizer-") as folder:
        names = [name for name in part_class.vocab_files_names.values() if _copied(place, name, Path(folder))]
        if not names:
            wanted = ", ".join(part_class.vocab_files_names.values())
            raise UserError(f"{place} is incomplete: a {part_class.__name__} needs {wanted}; download or copy it again")
        if all(name.endswith(".model") for name in names) and find_spec("sentencepiece") is None:
            raise UserError(
                f"{place} has its vocabulary as {names[0]} alone, which needs sentencepiece: pip install "
                "sentencepiece protobuf, or put the tokenizer.json of the same model beside it"
            )
        for name, schema in (
            (CONFIG, _SETTINGS),
            ("special_tokens_map.json", _TOKENS),
            ("added_tokens.json", _NUMBERS),
        ):
            file = place.optional(name)
            if file is not None:
                with replacing(Path(folder, name)) as temporary:
                    temporary.write_text(json.dumps(_settings(file, schema)), encoding="utf-8")
        return part_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenizer_class(place: Place) -> str | None:
    """The class that a tokenizer's settings name, to be compared with those that it may have.

    Raises:
        UserError: there are settings that cannot be read.
    """
    file = place.optional(CONFIG)
    name: str | None = None if file is None else _settings(file, _CLASS_NAME).get("tokenizer_class")
    return name


def _copied(place: Place, name: str, folder: Path) -> bool:
    file = place.optional(name)
    if file is not None:
        with replacing(Path(folder, name)) as temporary:
            temporary.write_bytes(read_bytes(file, VOCABULARY_BYTES))
    return file is not None


def _settings(file: Path, schema: Schema) -> Any:
    # "no limit" is written as a whole number of 30 digits
    text = utf8_text(file, _CONFIG_BYTES).replace(str(VERY_LARGE_INTEGER), "null")
    try:
        return schema.check(json_of(text))
    except ValueError as error:
        raise UnreadableError(file, str(error)) from None
